"""A packed cache store that mends what quantizing got wrong: outliers kept in full, and a low-rank copy of the rest.

An entry is read as ``backbone + low rank``, and as the number itself where that is an outlier. Entries are packed in
blocks: the prompt's, then one after the other as the cache grows. A block has a low-rank basis and outliers of its
own; what the rest of it is packed to is :mod:`~workers.mechanisms.quantized_cache`'s.

Shapes: B batch, H key-value heads, P packed entries, D head width, R rank, K blocks, N outliers of the fullest head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.mechanisms.kv_store import gather_entries
from workers.mechanisms.quantized_cache import SCALE_DTYPE, PackedKeys, PackedValues, QuantizedStore, still_needed

NONE = -1  # place of an outlier that is none: heads have different numbers of them
POWER_STEPS = 3
Packed = TypeVar("Packed", PackedKeys, PackedValues)


def extremes(x: Tensor, share: float) -> Tensor:
    """The largest and the smallest numbers of every vector, half of ``share`` at each end: bool like x [..., n].

    The number of both together is rounded; an odd one goes to the largest.
    """
    count = round(share * x.shape[-1])
    found = torch.zeros_like(x, dtype=torch.bool)
    for n, largest in ((count - count // 2, True), (count // 2, False)):
        free = x.masked_fill(found, float("-inf") if largest else float("inf"))
        found.scatter_(-1, free.topk(n, dim=-1, largest=largest).indices, True)
    return found


def levelled(x: Tensor, out: Tensor, dim: int) -> Tensor:
    """x with the numbers ``out`` replaced by the mean of the others along ``dim``: they widen no range any more."""
    rest = x.masked_fill(out, 0).sum(dim, keepdim=True) / (~out).sum(dim, keepdim=True).clamp_min(1)
    return torch.where(out, rest, x)


@dataclass
class Outliers:
    """Numbers kept in full.

    Attributes:
        places: [B, H, N] int32, ``entry * D + channel`` or :data:`NONE`; numbers: [B, H, N] as they came.
    """

    places: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, x: Tensor, out: Tensor) -> Outliers:
        """The numbers ``out`` (bool) of x, both [B, H, P, D]."""
        chosen = out.flatten(2)
        order = chosen.int().argsort(dim=-1, descending=True, stable=True)[..., : int(chosen.sum(-1).max())]
        places = torch.where(chosen.gather(2, order), order, NONE)
        return cls(places.to(torch.int32), x.flatten(2).gather(2, order))

    def put(self, x: Tensor) -> Tensor:
        """x [B, H, P, D] with them in their places."""
        flat, places = F.pad(x.flatten(2), (0, 1)), self.places.long()  # the last place takes those that are none
        places = places.where(places != NONE, flat.shape[2] - 1)
        return flat.scatter_(2, places, self.numbers.to(x.dtype))[:, :, :-1].view_as(x)

    def joined(self, newer: Outliers, entries: int, channels: int) -> Outliers:
        """Both, the other one's behind these ``entries``."""
        behind = torch.where(newer.places == NONE, newer.places, newer.places + entries * channels)
        return Outliers(torch.cat((self.places, behind), 2), torch.cat((self.numbers, newer.numbers), 2))

    def take(self, index: Tensor, entries: int, channels: int) -> Outliers:
        """Those of the entries ``index`` [B, H, n] among so many; an index that stands twice has them at its last place."""
        b, h, n = index.shape
        fate = torch.full((b, h, entries), NONE, device=index.device, dtype=index.dtype)
        fate = fate.scatter_reduce(2, index, torch.arange(n, device=index.device).expand(b, h, n), "amax")
        old = self.places.long()
        entry = fate.gather(2, old.clamp_min(0) // channels)
        stays = (old != NONE) & (entry != NONE)
        order = stays.int().argsort(dim=-1, descending=True, stable=True)[..., : int(stays.sum(-1).max())]
        places = torch.where(stays, entry * channels + old.remainder(channels), NONE)
        return Outliers(places.gather(2, order).to(torch.int32), self.numbers.gather(2, order))


@dataclass
class LowRank:
    """Products of two thin matrices, one product a block.

    Attributes:
        left: [B, H, P, R]; right: [B, H, K, R, D]; both in the format of the scales.
        block_of: [B, H, P] int32, the block of each entry; None = all are of one.
    """

    left: Tensor
    right: Tensor
    block_of: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, rank: int) -> LowRank:
        """Nearly the best approximation of rank ``rank`` of x [B, H, P, D] (float32), by power iteration from a fixed start."""
        rank = min(rank, x.shape[3])
        right = torch.randn(x.shape[3], rank, generator=torch.Generator().manual_seed(0)).to(x.device)
        for _ in range(POWER_STEPS):
            left = torch.linalg.qr(x @ right).Q  # [B, H, P, min(P, R)]
            right = x.transpose(2, 3) @ left
        left, right = (F.pad(m, (0, rank - left.shape[3])) for m in (left, right))  # a block of fewer entries than R
        return cls(left.to(SCALE_DTYPE), right.transpose(2, 3).unsqueeze(2).to(SCALE_DTYPE))

    def read(self) -> Tensor:
        """The products [B, H, P, D] in float32."""
        left = self.left.float()
        if self.block_of is None:
            return left @ self.right[:, :, 0].float()
        right = gather_entries(self.right.flatten(3), self.block_of.long()).float()
        return torch.einsum("bhpr,bhprd->bhpd", left, right.view(*left.shape, self.right.shape[4]))

    def joined(self, newer: LowRank) -> LowRank:
        """Both, the other one's entries last."""
        ids = torch.cat((self._explicit(), newer._explicit() + self.right.shape[2]), 2)
        return LowRank(torch.cat((self.left, newer.left), 2), torch.cat((self.right, newer.right), 2), ids)

    def take(self, index: Tensor) -> LowRank:
        """Only the entries ``index`` [B, H, n]; blocks that no entry needs any more are dropped."""
        left = gather_entries(self.left, index)
        if self.block_of is None:
            return LowRank(left, self.right)
        order, ids = still_needed(self.block_of.gather(2, index), self.right.shape[2])
        right = gather_entries(self.right.flatten(3), order).unflatten(3, self.right.shape[3:])
        return LowRank(left, right, ids)

    def heads(self, start: int, stop: int) -> LowRank:
        """Only these heads."""
        ids = None if self.block_of is None else self.block_of[:, start:stop].clone()
        return LowRank(self.left[:, start:stop].clone(), self.right[:, start:stop].clone(), ids)

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive."""
        return [x for x in (self.left, self.right, self.block_of) if x is not None]

    def _explicit(self) -> Tensor:
        if self.block_of is not None:
            return self.block_of
        return torch.zeros(self.left.shape[:3], dtype=torch.int32, device=self.left.device)


@dataclass
class Mended(Generic[Packed]):
    """Packed keys or values with what mends them."""

    backbone: Packed
    low_rank: LowRank
    outliers: Outliers
    channels: int

    @classmethod
    def of(cls, x: Tensor, out: Tensor, backbone: Packed, rank: int) -> Mended[Packed]:
        """x [B, H, P, D] as packed without the numbers ``out`` (bool)."""
        missed = (x.float() - backbone.read()).masked_fill(out, 0)
        return cls(backbone, LowRank.of(missed, rank), Outliers.of(x, out), x.shape[3])

    @property
    def width(self) -> int:
        return self.backbone.width

    def read(self) -> Tensor:
        """Entries [B, H, P, D] in float32."""
        return self.outliers.put(self.backbone.read() + self.low_rank.read())

    def joined(self, newer: Mended[Packed]) -> Mended[Packed]:
        """Both, the other one's entries last."""
        outliers = self.outliers.joined(newer.outliers, self.width, self.channels)
        backbone = self.backbone.joined(newer.backbone)
        return Mended(backbone, self.low_rank.joined(newer.low_rank), outliers, self.channels)

    def take(self, index: Tensor) -> Mended[Packed]:
        outliers = self.outliers.take(index, self.width, self.channels)
        return Mended(self.backbone.take(index), self.low_rank.take(index), outliers, self.channels)

    def heads(self, start: int, stop: int) -> Mended[Packed]:
        places, numbers = (x[:, start:stop].clone() for x in (self.outliers.places, self.outliers.numbers))
        return Mended(
            self.backbone.heads(start, stop), self.low_rank.heads(start, stop), Outliers(places, numbers), self.channels
        )

    def tensors(self) -> list[Tensor]:
        return [*self.backbone.tensors(), *self.low_rank.tensors(), self.outliers.places, self.outliers.numbers]


class GearStore(QuantizedStore):
    """A quantized store whose packed entries are mended, block by block.

    Args:
        keys, values, bits, group_size, residual: as in :class:`~workers.mechanisms.quantized_cache.QuantizedStore`.
        rank: of the low-rank copy of what quantizing missed, per head and block.
        outliers: share of the numbers kept in full: of every channel of a block's keys, of every entry's values.
    """

    def __init__(self, keys: Tensor, values: Tensor, bits: int, group_size: int, residual: int, rank: int, outliers: float):
        self.rank, self.outliers = rank, outliers
        super().__init__(keys, values, bits, group_size, residual)

    def _form(self, keys: Tensor, values: Tensor) -> tuple[Mended[PackedKeys], Mended[PackedValues]]:
        out = extremes(keys.transpose(2, 3), self.outliers).transpose(2, 3)
        level = levelled(keys.unflatten(2, (-1, self.group_size)), out.unflatten(2, (-1, self.group_size)), dim=3)
        mended_keys = Mended.of(keys, out, PackedKeys.of(level.flatten(2, 3), self.bits, self.group_size), self.rank)
        b, h, p, d = values.shape
        entries = values.transpose(1, 2).reshape(b, p, h * d)  # the vector of an entry over all of these heads
        out = extremes(entries, self.outliers).view(b, p, h, d).transpose(1, 2)
        split = (-1, PackedValues.channels_of(self.group_size, d))
        level = levelled(values.unflatten(3, split), out.unflatten(3, split), dim=4).flatten(3)
        mended_values = Mended.of(values, out, PackedValues.of(level, self.bits, self.group_size), self.rank)
        return mended_keys, mended_values
