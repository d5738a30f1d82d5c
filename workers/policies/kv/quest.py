"""Quest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.cache import PADDING, StudioCache
from workers.mechanisms.pages import Pages, together
from workers.mechanisms.part_reading import reading_part
from workers.methods import Policy, card, knob
from workers.session import Session


class Quest(Policy):
    """Evict nothing, but let every new token read only the pages of the cache that it could look at most.

    Tang et al. 2024, arXiv:2406.10774, section 3: per page the smallest and the largest number of every key channel
    are kept; a query's products with them bound what it could agree with any key of the page, and the pages with the
    largest bounds are read, the newest one always. The prompt and the first layers attend to everything. Deviations:
    the budget is a share of the pages (the paper's is a number of tokens), at least one page; a KV head reads the
    pages of the largest bound over its query heads; tokens that pass together (scoring, drafts) read the same pages,
    by the largest bound over them all, and those that they stand in themselves on top; of a model of few layers the
    last one always reads by pages. Layers with a sliding window choose among the pages in it. In a rounded cache the
    bounds are those of the keys as they came. The bounds add to the cache, and reading copies what is chosen, so
    neither bytes nor time fall here: what falls is what is read.
    """

    card: ClassVar[Card] = card(
        id="quest",
        title="Quest",
        paper="arXiv:2406.10774",
        stage="kv",
        families=("llm", "vlm"),
        owns=("attention.pattern",),
        needs=("attention.scores",),
        effects={"unread_kv_share": "up", "kv_bytes": "up", "kept_prompt_tokens": "same"},
        hopes={"decode_tokens_per_s": "up"},
        neutral={"keep": 1.0},
    )
    keep: float = knob(0.25, ge=0.01, le=1.0, help="share of the pages that a new token reads; lower = less read, worse recall")
    page_size: int = knob(16, ge=1, le=256, help="positions of a page; smaller = a finer choice, more bounds to keep and compare")
    skip_layers: int = knob(2, ge=0, le=256, help="first layers that read everything; more = safer, more read")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Bound the pages once the prompt is cached, and choose among them at every step."""
        return nullcontext() if self.is_neutral else self._reading(session)

    @contextmanager
    def _reading(self, session: Session) -> Iterator[None]:
        with session.hooked(session.after_prefill, self.bound), reading_part(session, self.card.id, self.choose):
            yield

    def bound(self, cache: StudioCache, forward: Forward) -> None:
        """Have the later layers keep bounds of their pages from now on."""
        layers = [layer for layer in cache.kv_layers if layer.groups]
        for layer in layers[min(self.skip_layers, len(layers) - 1) :]:
            for group in layer.groups:
                group.pages = Pages.of(group.held(), self.page_size)

    def choose(self, call: AttentionCall) -> Tensor | None:
        """The entries of the pages to read [B, H, n]; None = all."""
        found = [g.pages for g in call.cache.groups if g.pages is not None]
        if not found:
            return None
        pages = together(found)
        chosen = pages.best(call.query, self.keep, reach(call))
        return None if chosen is None else pages.index(chosen, max(g.store.length for g in call.cache.groups))

    def kv_factor(self) -> float:
        """Two more keys a page, which has as many keys and values as positions."""
        return 1 + 1 / self.page_size


def reach(call: AttentionCall) -> Tensor | None:
    """How many of each head's real entries lie before the window of every query of this call [B, H]; None = no window."""
    if call.window is None:
        return None
    places = call.held.places()
    oldest = call.forward.positions_at(call.layer)[:, :1, None]  # [B, 1, 1]
    before = (places <= oldest - call.window) & (places != PADDING)
    return before.sum(2).expand(call.query.shape[0], call.cache.heads)
