"""The base of policies that choose once for all heads of a layer: every head keeps the same positions.

Shapes: B batch, S stored entries.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor

from workers.cards import knob
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import FREE, Guarded, keep_best
from workers.mechanisms.evictor import Budgeted, voters
from workers.session import Session


class SharedChoice(Budgeted):
    """Keeps the positions with the best scores, the same ones in all heads of a layer."""

    def scores(self, call: AttentionCall) -> Tensor:
        """How much each stored entry of one layer is worth [B, S], higher = keep."""
        raise NotImplementedError

    def guarded(self, call: AttentionCall) -> Guarded:
        """What always stays."""
        return FREE

    def choose(self, call: AttentionCall) -> Tensor | None:
        """The best by score, within the budget: [B, H, n]."""
        return self.best(call, self.scores(call))

    def best(self, call: AttentionCall, scores: Tensor) -> Tensor | None:
        """The best by these scores [B, S], within the budget: [B, H, n]; None = all."""
        guarded = self.guarded(call)
        return best_in_all_heads(call, scores, self.counts(call, guarded), guarded)


class SharedWindowChoice(SharedChoice):
    """A shared choice by what the newest queries say, which every layer therefore remembers."""

    window: int = knob(32, ge=1, le=512, help="last prompt tokens whose attention votes; they always stay")

    def remembering(self, session: Session) -> AbstractContextManager[None]:
        """Have every layer remember as many queries as vote."""
        return session.remembering(self.window, on=self.when != "prefill")

    def guarded(self, call: AttentionCall) -> Guarded:
        """The window that votes."""
        return voters(call, self.window)


def best_in_all_heads(call: AttentionCall, scores: Tensor, counts: list[int], guarded: Guarded = FREE) -> Tensor | None:
    """The ``counts`` best entries of each row by scores [B, S], for every KV head the same: [B, H, n]; None = all."""
    scores = scores[:, None].expand(-1, call.cache.heads, -1)
    return keep_best(call, scores, counts, guarded.recent, guarded.sinks)
