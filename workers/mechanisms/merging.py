"""Merging cached entries instead of dropping them: what leaves is folded into what stays, in every KV head for itself.

An eviction names the entries that stay. Here the others are assigned to them, either each to the one with the most
similar key (LOOK-M, arXiv:2406.18139, figure 4) or each to the next few that stay behind it (CaM, Zhang et al.
2024, PMLR 235), and the entries that stay are computed anew. Padding is neither merged nor merged into.

Shapes: B batch, H KV heads, S stored entries, n that stay, m that leave, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.mechanisms.held import Held
from workers.mechanisms.kv_store import gather_entries

Rule = Literal["averaged", "pivotal", "weighted"]
NONE = -1  # no entry


@dataclass(frozen=True)
class Parting:
    """Which entries stay and which leave, as places among those held.

    Attributes:
        staying: [B, H, n], ascending, below 0 = padding; laid out as the layer will hold them.
        leaving: [B, H, m], ascending, then filled up with :data:`NONE`.
    """

    staying: Tensor
    leaving: Tensor

    @classmethod
    def of(cls, held: Held, kept: Tensor | Sequence[Tensor]) -> Parting:
        """From an eviction's choice: [B, H, n], or [B, n] a head, below 0 = no entry."""
        if not isinstance(kept, Tensor):
            longest = max(head.shape[1] for head in kept)
            kept = torch.stack([F.pad(head, (longest - head.shape[1], 0), value=NONE) for head in kept], 1)
        b, h, s = kept.shape[0], kept.shape[1], held.keys.shape[2]
        leaves = torch.ones(b, h, s + 1, dtype=torch.bool, device=kept.device)
        leaves = leaves.scatter_(2, torch.where(kept < 0, s, kept), False)[:, :, :s]  # place s takes what is no entry
        if held.real is not None:
            real = held.real.expand(b, h, s)
            kept = torch.where((kept >= 0) & real.gather(2, kept.clamp_min(0)), kept, NONE)
            leaves = leaves & real
        first = leaves.int().argsort(dim=-1, descending=True, stable=True)[:, :, : int(leaves.sum(-1).max())]
        return cls(kept, torch.where(leaves.gather(2, first), first, NONE))

    @property
    def leaves(self) -> Tensor:
        """Which of ``leaving`` are entries [B, H, m]."""
        return self.leaving >= 0

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of x [B, H, S, D] that stay and that leave, in float32: [B, H, n, D], [B, H, m, D]."""
        stays, leaves = (gather_entries(x, index.clamp_min(0)).float() for index in (self.staying, self.leaving))
        return stays, leaves


# -- into the most similar ---------------------------------------------------------------------
def nearest(held: Held, parting: Parting, rows: int = 1024) -> tuple[Tensor, Tensor]:
    """For every leaving entry the staying one whose key has the largest cosine to its own.

    In blocks of ``rows`` leaving entries, so that no matrix of all against all is kept.

    Returns:
        Places among those that stay [B, H, m], :data:`NONE` where nothing leaves; cosines [B, H, m].
    """
    stays, leaves = (F.normalize(x, dim=-1) for x in parting.parts(held.keys))
    found = []
    for start in range(0, max(1, leaves.shape[2]), rows):
        block = leaves[:, :, start : start + rows]
        cosines = (block @ stays.transpose(2, 3)).masked_fill(parting.staying[:, :, None] < 0, float("-inf"))
        found.append(cosines.max(-1))
    cosine = torch.cat([x.values for x in found], 2)
    target = torch.cat([x.indices for x in found], 2)
    return torch.where(parting.leaves, target, NONE), cosine


def alike(target: Tensor, cosine: Tensor) -> Tensor:
    """``target`` without the entries whose cosine is below the mean of all that leave this layer in their row."""
    leaves = target >= 0
    mean = cosine.masked_fill(~leaves, 0.0).sum((1, 2), keepdim=True) / leaves.sum((1, 2), keepdim=True).clamp_min(1)
    return torch.where(cosine >= mean, target, NONE)


def folded(x: Tensor, parting: Parting, target: Tensor, rule: Rule, weight: Tensor) -> Tensor:
    """What the staying rows of x become: [B, H, n, D]. A row into which nothing goes stays as it is, to the last bit.

    With c a staying row and e_1 to e_k those that go into it, LOOK-M figure 4:

    ========  ===============================================
    averaged  (c + sum of e) / (k + 1)
    pivotal   (c + sum of (e + c) / 2) / (k + 1)
    weighted  (c + sum of weight of e times e) / (k + 1)
    ========  ===============================================

    Args:
        x: [B, H, S, D], keys or values.
        target: [B, H, m] into which of the staying rows each leaving one goes, below 0 = into none.
        weight: [B, H, m], of the weighted rule.
    """
    stays, leaves = parting.parts(x)
    goes, into = target >= 0, target.clamp_min(0)
    pivot = gather_entries(stays, into)
    if rule == "weighted":
        leaves = leaves * weight.unsqueeze(-1)
    change = (leaves - pivot) * (0.5 if rule == "pivotal" else 1.0)  # by differences: what equals the pivot adds exactly 0
    change = change.masked_fill(~goes.unsqueeze(-1), 0.0)
    total = torch.zeros_like(stays).scatter_add_(2, into.unsqueeze(-1).expand_as(change), change)
    count = torch.ones_like(stays[..., 0]).scatter_add_(2, into, goes.to(stays.dtype))
    return (stays + total / count.unsqueeze(-1)).to(x.dtype)


def into_nearest(held: Held, kept: Tensor | Sequence[Tensor], rule: Rule, only_alike: bool = False) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, n, D] of the kept entries after the others went into the most similar of them.

    Values go where their keys go.

    Args:
        only_alike: leave out entries that are less similar to any kept one than the mean.
    """
    parting = Parting.of(held, kept)
    target, cosine = nearest(held, parting)
    if only_alike:
        target = alike(target, cosine)
    return folded(held.keys, parting, target, rule, cosine), folded(held.values, parting, target, rule, cosine)


# -- into those that follow --------------------------------------------------------------------
@dataclass(frozen=True)
class Following:
    """For every leaving entry the next ``span`` entries that stay behind it.

    Attributes:
        first: [B, H, m] place of the first of them among those that stay.
        room: [B, H, m] how many there are: ``span``, fewer near the end, 0 where nothing leaves.
    """

    parting: Parting
    span: int
    first: Tensor
    room: Tensor

    @classmethod
    def of(cls, parting: Parting, span: int) -> Following:
        """The next ``span`` behind each."""
        first = torch.searchsorted(parting.staying.contiguous(), parting.leaving.contiguous(), right=True)
        room = (parting.staying.shape[2] - first).clamp_max(span) * parting.leaves
        return cls(parting, span, first.clamp_max(parting.staying.shape[2] - 1), room)

    def ratio(self, weight: Tensor) -> Tensor:
        """What each leaving entry weighs, over the mean of those that follow it: [B, H, m].

        Args:
            weight: [B, H, S], none below 0. 0 / 0 is 0.
        """
        stays, leaves = (weight.gather(2, x.clamp_min(0)) for x in (self.parting.staying, self.parting.leaving))
        ahead = F.pad(stays, (0, self.span - 1)).unfold(2, self.span, 1).sum(-1)  # [B, H, n] of each and those behind it
        mean = ahead.gather(2, self.first) / self.room.clamp_min(1)
        return torch.where((leaves > 0) & (self.room > 0), leaves / mean, 0.0)

    def spread(self, x: Tensor, goes: Tensor) -> Tensor:
        """The staying rows of x, each leaving row added to those that follow it in equal parts: [B, H, n, D].

        Args:
            x: [B, H, S, D].
            goes: [B, H, m] which of the leaving rows are added; the others are dropped.
        """
        stays, leaves = self.parting.parts(x)
        part = (leaves / self.room.clamp_min(1).unsqueeze(-1)).masked_fill(~(goes & (self.room > 0)).unsqueeze(-1), 0.0)
        begins = torch.zeros_like(stays).scatter_add_(2, self.first.unsqueeze(-1).expand_as(part), part)
        added = F.pad(begins, (0, 0, self.span - 1, 0)).unfold(2, self.span, 1).sum(-1)
        return (stays + added).to(x.dtype)
