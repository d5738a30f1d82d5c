"""Evicting cached positions: the moment, the budget, the choice by score.

A policy hands in one function that looks at an attention call and names the entries to keep.
Budgets count prompt positions: ``keep`` = 0.25 of 1,000 prompt tokens leaves 250 in every KV head,
protected ones included. Each row of a padded batch has the budget of its own prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.cache import PADDING, HeadGroup
from workers.mechanisms.ranking import best_of_real
from workers.session import Session

Choose = Callable[[AttentionCall], Tensor | None]


def budgets(call: AttentionCall, keep: float, protected: int = 1) -> list[int]:
    """Entries left of each row's prompt: the share ``keep``, never fewer than the protected ones or than 1."""
    return [min(n, max(round(keep * n), protected, 1)) for n in call.forward.prompt_lengths]


@contextmanager
def evicting(session: Session, policy: str, choose: Choose, every: int = 0) -> Iterator[None]:
    """Let ``choose`` evict in every layer at the end of the prefill.

    Args:
        choose: attention call -> entries to keep [B, H, n], ascending; None = keep all.
        every: also after every n-th decode step; 0 = never.
    """

    def observe(call: AttentionCall) -> None:
        forward = call.forward
        if forward.phase == "prefill":
            due = forward.ends_prefill
        else:
            new = forward.seen - forward.prompt_tokens
            due = bool(every) and new // every > (new - forward.positions.shape[1]) // every
        if not due:
            return
        index = choose(call)
        if index is not None:
            session.did(policy, call.cache.stored - index.shape[-1])
            call.cache.keep(index)

    with session.hooked(session.observers, observe):
        yield


def keep_best(
    call: AttentionCall, scores: Tensor, counts: Sequence[int], recent: int | Sequence[int] = 0, sinks: int = 0
) -> Tensor | None:
    """The best entries of each KV head, positions below ``sinks`` and the newest ``recent`` always among them.

    Args:
        scores: [B, H, S], higher = keep.
        counts: entries to keep in each row.
        recent: newest entries that stay, of all rows or of each.

    Returns:
        Indices [B, H, max(counts)], ascending; a row with a smaller count is filled up with its padding. None if
        there is nothing to evict.
    """
    s = scores.shape[-1]
    if s <= max(counts):
        return None
    scores, group = scores.clone(), call.cache.group
    newest = [recent] * len(counts) if isinstance(recent, int) else recent
    for row, n in enumerate(newest):
        if n:
            scores[row, :, -n:] = float("inf")
    if sinks:  # by position: a padded row begins with padding
        place = group.positions if group.positions is not None else torch.arange(s, device=scores.device)
        scores.masked_fill_(((place >= 0) & (place < sinks)).expand_as(scores), float("inf"))
    real = real_entries(group)
    if real is None:
        return scores.topk(max(counts), dim=-1).indices.sort(-1).values
    return best_of_real(scores, real.expand_as(scores), torch.tensor(counts, device=scores.device))


def real_entries(group: HeadGroup) -> Tensor | None:
    """Which stored entries are no padding: bool [B, 1 or H, S]; None = all."""
    return None if group.positions is None or not group.padded else group.positions != PADDING


def per_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """Mean over the query heads of each KV head: [B, Hq, ...] -> [B, H, ...]."""
    b, hq = x.shape[:2]
    return x.reshape(b, kv_heads, hq // kv_heads, *x.shape[2:]).mean(2)


def column_sums(call: AttentionCall, rows: int = 256) -> Tensor:
    """Attention that each stored entry received from this call's queries: [B, H, S] float32.

    Summed over queries in blocks of ``rows``, so that no L x L tensor is kept; mean over the query
    heads of a KV head. Padded queries give nothing.
    """
    t = call.query.shape[2]
    keys = call.keys
    b, h, s = keys.shape[:3]
    total = torch.zeros(b, h, s, device=keys.device)
    positions = call.forward.positions_at(call.layer)
    for start in range(0, t, rows):
        stop = min(start + rows, t)
        probs = call.probabilities(call.query[:, :, start:stop], start)
        real = (positions[:, start:stop] != PADDING)[:, None, :, None]
        total += per_kv_head((probs * real).sum(2), h)
    return total
