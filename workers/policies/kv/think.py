"""ThinK."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.cache import PADDING, HeadGroup, StudioCache
from workers.mechanisms.thin_keys import thin_store
from workers.methods import Policy, card, knob
from workers.session import Session


class ThinK(Policy):
    """Drop the key channels through which the last prompt tokens look least, in every head its own.

    Xu et al. 2024, arXiv:2407.21018, section 3.2: a channel is worth the Frobenius norm of the product of its
    queries, over the last ``window`` prompt tokens, with its keys, which is the norm of the one times the norm of the
    other; the best channels stay. Keys of the newest ``window`` entries and all later ones stay whole. It acts on what
    an evictor leaves, as in the released code. The query heads of one KV head count as further queries (the paper
    repeats the keys for each of them), and padding counts for nothing. Values are not pruned, as in the paper's main
    results. Deviation: attention reads a copy with zeros in the place of what was pruned, so bytes fall and time does
    not.
    """

    card: ClassVar[Card] = card(
        id="think",
        title="ThinK",
        paper="arXiv:2407.21018",
        stage="kv",
        families=("llm", "vlm"),
        owns=("kv.dtype",),
        needs=("attention.scores",),
        effects={"kv_bytes": "down", "prefill_kv_bytes": "down"},
        neutral={"keep_channels": 1.0},
    )
    keep_channels: float = knob(0.6, ge=0.05, le=1.0, help="share of key channels kept; lower = smaller and less exact")
    window: int = knob(32, ge=1, le=512, help="last prompt tokens whose queries choose; the newest keys, as many, stay whole")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Look at the last queries, and prune once every evictor has acted on the prompt."""
        return nullcontext() if self.is_neutral else self._pruning(session)

    @contextmanager
    def _pruning(self, session: Session) -> Iterator[None]:
        looked: dict[int, Tensor] = {}  # layer -> squared norms of its query channels [B, H, D]

        def look(call: AttentionCall) -> None:
            if call.forward.phase == "prefill" and call.forward.ends_prefill:
                looked[call.layer] = self.query_norms(call)

        def prune(cache: StudioCache, forward: Forward) -> None:
            for layer, queries in looked.items():
                for group in cache.layers[layer].groups:
                    self.prune(group, queries[:, group.start : group.stop])
                    session.did(self.card.id, max(0, group.store.length - self.window))
            looked.clear()

        looks, prunes = session.hooked(session.observers, look), session.hooked(session.storage, prune)
        with session.remembering(self.window), looks, prunes:
            yield

    def query_norms(self, call: AttentionCall) -> Tensor:
        """Squared norm of every channel over the newest queries of a KV head's query heads [B, H, D]."""
        queries = call.newest_queries(self.window)  # [B, Hq, w, D]
        real = call.newest_positions(self.window) != PADDING
        squares = (queries.float() * real[:, None, :, None]).square().sum(2)
        b, _, d = squares.shape
        return squares.reshape(b, call.cache.heads, -1, d).sum(2)

    def prune(self, group: HeadGroup, queries: Tensor) -> None:
        """Keep the best channels of the old keys of these heads.

        Args:
            queries: squared norms of their query channels [B, H, D].
        """
        held = group.held()
        keys = held.keys.float() if held.real is None else held.keys.float() * held.real.unsqueeze(-1)
        scores = queries * keys.square().sum(2)
        count = max(1, round(self.keep_channels * scores.shape[-1]))
        channels = scores.topk(count, dim=-1).indices.sort(-1).values
        group.store = thin_store(held.keys, held.values, channels, self.window)

    def kv_factor(self) -> float:
        """Keys are half of the cache; their newest ones, which stay whole, are not known here."""
        return (1 + self.keep_channels) / 2
