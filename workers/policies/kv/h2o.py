"""H2O."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import Guarded, When, column_sums
from workers.mechanisms.evictor import EVICTS, Evictor
from workers.methods import card, knob
from workers.session import Session

SUMS = "h2o"  # name of the running sums in HeadGroup.tracked


class H2O(Evictor):
    """Keep the positions that gathered most attention so far (heavy hitters) and the newest ones.

    Zhang et al. 2023, arXiv:2306.14048, section 4: every query, of the prompt and of decoding, adds its
    attention to the positions it looks at; half of the budget goes to the largest sums, half to the newest
    positions. Deviations: the query heads of one KV head are averaged (the paper's models have no grouped
    queries), and while decoding it evicts every ``every`` tokens instead of at each.
    """

    card: ClassVar[Card] = card(
        id="h2o",
        title="H2O",
        paper="arXiv:2306.14048",
        **EVICTS | {"effects": EVICTS["effects"] | {"kv_bytes": "down", "cached_tokens": "down"}},
    )
    keep: float = knob(0.5, ge=0.01, le=1.0, help="size of the cache as a share of the prompt; 1 = never evict")
    when: When = knob("both", help="both = at the end of the prompt and while answering; or one of the two")
    every: int = knob(8, ge=1, le=256, help="evict every so many new tokens; more = less work, a slightly longer cache")
    recent: float = knob(0.5, ge=0.0, le=1.0, help="share of the budget for the newest positions; the rest goes to heavy hitters")

    @contextmanager
    def _evicting(self, session: Session) -> Iterator[None]:
        with session.hooked(session.observers, self.add), super()._evicting(session):
            yield

    def add(self, call: AttentionCall) -> None:
        """Add what this call's queries paid to each entry."""
        sums, before = column_sums(call), call.held.tracked.get(SUMS)
        call.cache.track(SUMS, sums if before is None else before + sums)

    def scores(self, call: AttentionCall) -> Tensor:
        """The sums so far [B, H, S]."""
        return call.held.tracked[SUMS]

    def guarded(self, call: AttentionCall) -> Guarded:
        """The newest positions' share of the budget."""
        return Guarded(recent=[max(1, round(self.recent * n)) for n in self.counts(call)])
