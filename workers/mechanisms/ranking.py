"""Choosing the best entries of each row where rows differ in how many they may keep.

Shapes: B batch, H KV heads (or nothing), S entries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def best_of_all_real(scores: Tensor, count: int) -> Tensor:
    """The ``count`` best entries of each row of [..., S], count < S, ascending: [..., count].

    Where a single one leaves, as at every decode step of a cache that does not grow, nothing is sorted.
    """
    if scores.shape[-1] == count + 1:
        places = torch.arange(count, device=scores.device)
        return places + (places >= scores.argmin(-1, keepdim=True))
    return scores.topk(count, dim=-1).indices.sort(-1).values


def best_of_real(scores: Tensor, real: Tensor, counts: Tensor) -> Tensor:
    """The ``counts`` best real entries of each row, ascending, filled up with padding: [B, ..., max(counts)].

    So every row of a padded batch keeps what it would keep alone, and the result is one tensor all the same.

    Args:
        scores: [B, ..., S], higher = keep.
        real: the same shape, False for padding. A row that pads less than it lacks against the longest count gets
            places below 0 instead.
        counts: [B].
    """
    ranked = scores.masked_fill(~real, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(ranked.shape[-1], device=ranked.device)
    rank = torch.empty_like(ranked).scatter_(-1, ranked, places.expand_as(ranked))
    chosen = real & (rank < counts.view(-1, *[1] * (scores.dim() - 1)))
    preference = chosen.int() * 2 + (~real).int()  # chosen, then padding, then what is dropped
    best = preference.argsort(dim=-1, descending=True, stable=True)[..., : int(counts.max())]
    return torch.where(preference.gather(-1, best) > 0, best, -1).sort(-1).values


def smooth(scores: Tensor, kernel: int, real: Tensor | None = None) -> Tensor:
    """Mean of each entry and its neighbours, ``kernel`` wide, over those that exist: [B, H, S].

    Args:
        scores: [B, H, S].
        real: broadcastable to it, False for padding; None = all are real.
    """
    if kernel == 1:
        return scores
    size = scores.shape[-1]
    if real is None:
        return F.avg_pool1d(scores, kernel, 1, kernel // 2, count_include_pad=False)[..., :size]
    real = real.expand_as(scores)
    total, there = (F.avg_pool1d(x, kernel, 1, kernel // 2)[..., :size] for x in (scores * real, real.to(scores.dtype)))
    return total / there.clamp_min(torch.finfo(scores.dtype).tiny)
