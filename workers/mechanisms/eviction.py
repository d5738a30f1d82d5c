"""Evicting cached positions: the moment, the choice by score, one length for all heads or one for each.

A policy hands in one function that looks at an attention call and names the entries to keep.
Budgets count prompt positions: ``keep`` = 0.25 of 1,000 prompt tokens leaves 250 in every KV head,
protected ones included. Each row of a padded batch has the budget of its own prompt.

Shapes: B batch, H KV heads, Hq query heads, S stored entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workers.mechanisms.attention import AttentionCall, Forward, InPrompts
from workers.mechanisms.cache import PADDING, StudioCache
from workers.mechanisms.chunk_end import ChunkEnd
from workers.mechanisms.held import Held
from workers.mechanisms.ranking import best_of_all_real, best_of_real
from workers.session import Session

Kept = Tensor | list[Tensor]
Choose = Callable[[AttentionCall], Kept | None]
Fold = Callable[[AttentionCall, Kept], tuple[Tensor, Tensor] | None]
When = Literal["prefill", "decode", "both"]


@dataclass(frozen=True)
class Guarded:
    """Entries that always stay: positions below ``sinks``, and the newest ``recent`` of all rows or of each."""

    recent: int | Sequence[int] = 0
    sinks: int = 0

    def newest(self, rows: int) -> list[int]:
        """How many of the newest entries stay in each row."""
        return [self.recent] * rows if isinstance(self.recent, int) else list(self.recent)


FREE = Guarded()


def budgets(call: AttentionCall, keep: float, guarded: Guarded = FREE) -> list[int]:
    """Entries left of each row's prompt: the share ``keep``, never fewer than the guarded ones or than 1."""
    lengths = call.forward.prompt_lengths
    return [
        min(n, max(round(keep * n), recent + guarded.sinks, 1))
        for n, recent in zip(lengths, guarded.newest(len(lengths)), strict=True)
    ]


@contextmanager
def evicting(
    session: Session,
    policy: str,
    choose: Choose,
    when: When = "prefill",
    every: int = 1,
    between_chunks: bool = False,
    fold: Fold | None = None,
) -> Iterator[None]:
    """Let ``choose`` evict in every layer.

    Args:
        choose: attention call -> entries to keep, ascending: [B, H, n], or [B, n] a head; None = all.
        when: at the end of the prefill, after every ``every``-th decode step, or both.
        between_chunks: also after every earlier chunk of the prompt.
        fold: what the kept entries become by those that leave: attention call, choice -> keys and values [B, H, n, D],
            n of the longest head, the newest last; None = they stay as they are.
    """

    def observe(call: AttentionCall) -> None:
        if is_due(call.forward, when, every, between_chunks):
            evict(session, policy, call, choose, fold)

    with session.hooked(session.observers, InPrompts(observe) if when == "prefill" else observe):
        yield


@contextmanager
def evicting_behind(
    session: Session, policy: str, choose: Choose, when: When = "prefill", every: int = 1, between_chunks: bool = False
) -> Iterator[None]:
    """As :func:`evicting`, but when all layers have run: for scores that are not known before.

    ``choose`` is handed the layers one after the other, in calls without any query.
    """

    def everywhere(cache: StudioCache, forward: Forward) -> None:
        if not is_due(forward, when, every, between_chunks):
            return
        for call in layer_calls(cache, forward):
            evict(session, policy, call, choose)

    def behind_chunk(end: ChunkEnd) -> None:
        everywhere(end.forward.cache, end.forward)

    with session.hooked(session.after_chunk, behind_chunk), session.hooked(session.after_step, everywhere):
        yield


def layer_calls(cache: StudioCache, forward: Forward) -> Iterator[AttentionCall]:
    """A call without any query for every layer that holds something; one with a running state only, or left out, does not."""
    for number, memory in enumerate(cache.layers):
        if memory.groups:
            yield AttentionCall(number, memory.held().keys[:, :, :0], memory, forward, 1.0)


def is_due(forward: Forward, when: When, every: int, between_chunks: bool) -> bool:
    """Whether it is time to evict: see :func:`evicting`."""
    if forward.phase == "prefill":
        return when != "decode" and (forward.ends_prefill or between_chunks)
    new = forward.seen - forward.prompt_tokens
    return when != "prefill" and new // every > (new - forward.positions.shape[1]) // every


def evict(session: Session, policy: str, call: AttentionCall, choose: Choose, fold: Fold | None = None) -> None:
    """Keep of one layer what ``choose`` names."""
    index = choose(call)
    if index is not None:
        before = call.cache.stored
        folded = fold(call, index) if fold else None
        call.cache.keep(index)
        if folded is not None:
            call.cache.write(*folded)
        session.did(policy, before - call.cache.stored)


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
    if scores.shape[-1] <= max(counts):
        return None
    held = call.held
    scores = guarding(scores, held, Guarded(recent, sinks), len(counts))
    if held.real is None:
        return best_of_all_real(scores, max(counts))
    return best_of_real(scores, held.real.expand_as(scores), torch.tensor(counts, device=scores.device))


def keep_best_of_all(
    call: AttentionCall, scores: Tensor, counts: Sequence[int], guarded: Guarded, safeguard: float
) -> list[Tensor] | None:
    """The best entries of a layer, whichever heads they are in: heads differ in length, the layer holds what it would.

    Feng et al. 2024, Ada-KV, arXiv:2407.11550, algorithm 1: the heads' budgets follow from one ranking over all of
    them, mixed with equal ones by ``safeguard`` (:func:`mixed_budgets`). A head always keeps one.

    Args:
        scores: [B, H, S], higher = keep; comparable between heads.
        counts: entries a head to keep in each row, on average.

    Returns:
        Per head indices [B, n_h], ascending; where a row keeps fewer in a head than another row, below 0. None if
        there is nothing to evict.
    """
    b, h, s = scores.shape
    held = call.held
    real = torch.ones_like(scores, dtype=torch.bool) if held.real is None else held.real.expand_as(scores)
    if not bool((real.sum((1, 2)) > h * torch.tensor(counts, device=real.device)).any()):
        return None
    scores = guarding(scores, held, guarded, b).masked_fill(~real, float("-inf"))
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    chosen = torch.zeros_like(real)
    for row, n in enumerate(counts):
        ranked = scores[row].masked_fill((rank[row] == 0) & real[row], float("inf"))
        found = torch.zeros_like(real[row])
        found.view(-1)[ranked.flatten().topk(min(h * n, h * s)).indices] = True
        ours, room = (found & real[row]).sum(-1).tolist(), real[row].sum(-1).tolist()
        budget = torch.tensor(mixed_budgets(ours, n, room, safeguard), device=scores.device)
        chosen[row] = (rank[row] < budget[:, None]) & real[row]
    kept = []
    for head in range(h):
        mask = chosen[:, head]  # [B, S]
        first = mask.int().argsort(dim=-1, descending=True, stable=True)[:, : int(mask.sum(-1).max())]
        kept.append(torch.where(mask.gather(1, first), first, -1).sort(-1).values)
    return kept


def mixed_budgets(ranked: Sequence[int], equal: int, room: Sequence[int], safeguard: float) -> list[int]:
    """Entries of each head: the share ``safeguard`` of an equal budget, the rest as ranked, as many in all as ranked.

    Args:
        ranked: entries of each head among the best of all.
        equal: entries of each head if all were alike.
        room: entries that each head has; none of the ranked numbers is above.
    """
    exact = [(1 - safeguard) * n + safeguard * min(equal, most) for n, most in zip(ranked, room, strict=True)]
    counts = [min(int(x), most) for x, most in zip(exact, room, strict=True)]
    order = sorted(range(len(exact)), key=lambda head: counts[head] - exact[head])  # the largest fraction first
    while (rest := sum(ranked) - sum(counts)) > 0:
        for head in [h for h in order if counts[h] < room[h]][:rest]:
            counts[head] += 1
    return counts


def guarding(scores: Tensor, held: Held, guarded: Guarded, rows: int) -> Tensor:
    """A copy of the scores [B, H, S] in which what always stays is best."""
    scores = scores.clone()
    for row, n in enumerate(guarded.newest(rows)):
        if n:
            scores[row, :, -n:] = float("inf")
    if guarded.sinks:  # by position: a padded row begins with padding
        places = held.places()
        scores.masked_fill_(((places >= 0) & (places < guarded.sinks)).expand_as(scores), float("inf"))
    return scores


def newness(call: AttentionCall) -> Tensor:
    """How new each stored entry is, the newest most: [B, S] float32."""
    s = call.held.keys.shape[2]
    return torch.arange(s, device=call.query.device, dtype=torch.float32).expand(len(call.query), s)


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


def most_attention(call: AttentionCall, counted: Tensor, rows: int = 256) -> Tensor:
    """The largest attention of this call's queries to each entry [B, H, S], over them and the query heads of a KV head.

    In blocks of ``rows`` queries, as :func:`column_sums`.

    Args:
        counted: [B, T] False where a query has no vote.
    """
    b, h, s = call.held.keys.shape[:3]
    most = torch.zeros(b, h, s, device=call.query.device)
    for start in range(0, call.query.shape[2], rows):
        some = call.query[:, :, start : start + rows]
        probs = call.probabilities(some, start) * counted[:, None, start : start + rows, None]
        most = torch.maximum(most, probs.view(b, h, -1, s).amax(2))
    return most
