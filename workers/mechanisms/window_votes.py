"""Scoring cached positions by the votes of the newest queries: one way of scoring, several ways to share the budget.

Shapes: B batch, H KV heads, S stored entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.cards import knob
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import per_kv_head
from workers.mechanisms.evictor import QueryEvictor
from workers.mechanisms.ranking import smooth


class WindowVotes(QueryEvictor):
    """The attention of the last ``window`` queries, summed per position and smoothed over its neighbours.

    Li et al. 2024, SnapKV, arXiv:2404.14469, section 3. As in the released code only entries before the window are
    smoothed: what its queries ask of each other would always keep the entries next to it.
    """

    kernel: int = knob(5, ge=1, le=63, help="width of the smoothing; wider keeps whole phrases, 1 = none")

    def scores(self, call: AttentionCall) -> Tensor:
        """Votes [B, H, S], mean over the query heads of a KV head; those of the window itself are not compared."""
        queries = call.newest_queries(self.window)
        votes = per_kv_head(call.probabilities(queries).sum(2), call.cache.heads)
        real = call.held.real
        before = torch.ones_like(votes, dtype=torch.bool) if real is None else real.expand_as(votes).clone()
        before[..., -queries.shape[2] :] = False
        return smooth(votes, self.kernel, before)
