"""Scoring cached positions by all the attention they gathered so far.

Shapes: B batch, H KV heads, S stored entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from workers.cards import knob
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import FREE, Guarded, budgets, column_sums
from workers.mechanisms.evictor import Evictor
from workers.session import Session

SUMS = "gathered"  # name of the running sums in HeadGroup.tracked


class GatheredAttention(Evictor):
    """The sums of attention that every query, of the prompt and of decoding, paid to each position.

    Zhang et al. 2023, H2O, arXiv:2306.14048, section 4. The query heads of one KV head are averaged. Sums follow their
    entries through evictions and across chunks; a part of the budget goes to the newest positions whatever their sums.
    """

    recent: float = knob(0.5, ge=0.0, le=1.0, help="share of the budget for the newest positions; the rest goes to heavy hitters")

    @contextmanager
    def _evicting(self, session: Session) -> Iterator[None]:
        with session.hooked(session.observers, self.add), super()._evicting(session):
            yield

    def add(self, call: AttentionCall) -> None:
        """Add what this call's queries paid to each entry, as long as an eviction may still ask for it."""
        if self.when == "prefill" and call.forward.phase == "decode":
            return
        sums, before = column_sums(call), call.held.tracked.get(SUMS)
        call.cache.track(SUMS, sums if before is None else before + sums)

    def scores(self, call: AttentionCall) -> Tensor:
        """The sums so far [B, H, S]."""
        return call.held.tracked[SUMS]

    def counts(self, call: AttentionCall, guarded: Guarded = FREE) -> list[int]:
        """The budget of each row, of which the newest positions are a share in every layer."""
        return budgets(call, self.share(call), guarded)

    def guarded(self, call: AttentionCall) -> Guarded:
        """The newest positions' share of the budget."""
        return Guarded(recent=[max(1, round(self.recent * n)) for n in budgets(call, self.share(call))])
