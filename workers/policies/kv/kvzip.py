"""KVzip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from studio_state.catalog import Card
from workers.families.batches import Batch
from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.cache import PADDING, StudioCache
from workers.mechanisms.chunk_end import ChunkEnd
from workers.mechanisms.eviction import Guarded, evict, evicting, layer_calls, most_attention
from workers.mechanisms.evictor import EVICTS, Evictor, Heads, heads_knob, safeguard_knob
from workers.mechanisms.reconstruction import read_again
from workers.methods import card, knob
from workers.session import Session

ASKED = "asked"  # in HeadGroup.tracked: the largest attention to each entry so far


class KVzip(Evictor):
    """Keep the cached positions that the model needs to repeat the prompt from its cache.

    Kim et al. 2025, arXiv:2505.23416: behind the prompt the model is asked to repeat it and is shown the answer, the
    prompt itself, ``chunk_length`` tokens at a time. An entry's score is the largest attention that any of these queries
    pays to it, over the query heads of its KV head; what repeating does not need, no later question needs. Heads keep as
    much as their scores ask for, without a safeguard. The extra passes lie before the first token, count as forward
    passes, and leave the cache as it was.

    Deviations: the budget is a share in each layer (``layers``), within which heads compete (the paper ranks the heads of
    all layers together); attention is normalised over all that the model sees, and every piece scores every entry (the
    released code regards, of a long prompt, the piece's own entries alone); the whole prompt counts as context, its
    question and chat marks included, and only its first ``sinks`` positions always stay (the paper keeps the system
    prompt). A piece is shorter where the context is too short for it. With ``between_chunks`` only the newest chunk is
    read again; while answering (``when``) the attention of new tokens counts likewise.
    """

    card: ClassVar[Card] = card(
        id="kvzip",
        title="KVzip",
        paper="arXiv:2505.23416",
        not_traits=("ssm",),
        **EVICTS | {"families": ("llm",), "effects": EVICTS["effects"] | {"forward_passes": "up"}},
    )
    chunk_length: int = knob(2048, ge=8, le=16384, help="tokens that are read again at once; fewer = less memory, more passes")
    sinks: int = knob(4, ge=0, le=256, help="first positions that always stay")
    heads: Heads = heads_knob("adaptive")
    safeguard: float = safeguard_knob(0.0)

    @contextmanager
    def _evicting(self, session: Session) -> Iterator[None]:
        batches: list[Batch] = []
        early = self.between_chunks and self.when != "decode"

        def remember(batch: Batch) -> Batch:
            batches[:] = [batch]
            return batch

        def behind_chunk(end: ChunkEnd) -> None:
            if not end.forward.ends_prefill:
                finish(end.forward.cache, end.forward)

        def finish(cache: StudioCache, forward: Forward) -> None:
            self.ask(session, batches[0], forward, newest=early)
            if self.when != "decode":
                for call in layer_calls(cache, forward):
                    evict(session, self.card.id, call, self.choose)

        with ExitStack() as stack:
            stack.enter_context(session.hooked(session.prompt_filters, remember))
            stack.enter_context(session.hooked(session.after_prefill, finish))
            if early:
                stack.enter_context(session.hooked(session.after_chunk, behind_chunk))
            if self.when != "prefill":
                stack.enter_context(session.hooked(session.observers, follow))
                stack.enter_context(evicting(session, self.card.id, self.choose, "decode", self.every))
            yield

    def ask(self, session: Session, batch: Batch, forward: Forward, newest: bool) -> None:
        """Read the prompt as far as it goes again, or its newest chunk alone."""
        real = batch.positions[:, : forward.seen] != PADDING
        texts = [ids[there].tolist() for ids, there in zip(batch.ids[:, : forward.seen], real, strict=True)]
        new = (forward.positions != PADDING).sum(1).tolist() if newest else [len(text) for text in texts]
        read_again(session, forward, texts, [len(t) - n for t, n in zip(texts, new, strict=True)], self.chunk_length, ASKED)

    def scores(self, call: AttentionCall) -> Tensor:
        """The largest attention to each entry so far [B, H, S]."""
        return call.held.tracked[ASKED]

    def guarded(self, call: AttentionCall) -> Guarded:
        """The sinks."""
        return Guarded(sinks=self.sinks)


def follow(call: AttentionCall) -> None:
    """While answering, the attention of new tokens counts as well."""
    if call.forward.phase == "decode":
        voting = torch.ones_like(call.forward.positions, dtype=torch.bool)
        call.cache.track(ASKED, torch.maximum(call.held.tracked[ASKED], most_attention(call, voting)))
