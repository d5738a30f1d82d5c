"""A cache store with packed integers: old entries in few bits, the newest ones as they came.

Keys are quantized per channel over groups of entries, values per entry over groups of channels, both
asymmetric: ``x = code * scale + zero``. Nothing that is packed is ever quantized again: an eviction
moves codes, and every key remembers the group its scale belongs to.

Shapes: B batch, H key-value heads, S stored entries, P packed ones, D head width, G key groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.mechanisms.kv_store import gather_entries, storage_bytes

SCALE_DTYPE = torch.float16
_ULP = 2.0**-10  # relative step of SCALE_DTYPE: enough to round a bound outwards


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., D] (uint8, below 2**bits) as bytes [..., D * bits / 8], lowest bits first."""
    per_byte = 8 // bits
    parts = codes.unflatten(-1, (-1, per_byte))
    out = parts[..., 0].clone()
    for i in range(1, per_byte):
        out |= parts[..., i] << (i * bits)
    return out


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`pack_bits`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def quantize(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric round-to-nearest over ``dim``: codes (uint8), scale and zero (``dim`` kept, float16).

    Scale and zero are rounded outwards, so the error of every element is at most scale / 2.
    """
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero = low.to(SCALE_DTYPE)
    zero = torch.where(zero.float() > low, (low - low.abs() * _ULP).to(SCALE_DTYPE), zero)
    levels = 2**bits - 1
    exact = ((high - zero.float()) / levels).clamp_min(torch.finfo(SCALE_DTYPE).tiny)
    scale = exact.to(SCALE_DTYPE)
    scale = torch.where(scale.float() < exact, (exact * (1 + _ULP)).to(SCALE_DTYPE), scale)
    codes = ((x - zero.float()) / scale.float()).round().clamp(0, levels).to(torch.uint8)
    return codes, scale, zero


@dataclass
class PackedKeys:
    """Keys per channel.

    Attributes:
        codes: [B, H, P, D * bits / 8] uint8; scale, zero: [B, H, G, D].
        group_of: [B, H, P] int32, the group of each entry; None = entry // group_size.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int
    group_of: Tensor | None = None

    @classmethod
    def of(cls, keys: Tensor, bits: int, group_size: int) -> PackedKeys:
        """Quantize whole groups of keys [B, H, n * group_size, D]."""
        codes, scale, zero = quantize(keys.unflatten(2, (-1, group_size)), bits, dim=3)
        return cls(pack_bits(codes.flatten(2, 3), bits), scale.squeeze(3), zero.squeeze(3), bits, group_size)

    def read(self) -> Tensor:
        """Keys [B, H, P, D] in float32."""
        codes = unpack_bits(self.codes, self.bits).float()
        if self.group_of is None:
            grouped = codes.unflatten(2, (-1, self.group_size))
            return (grouped * self.scale.float().unsqueeze(3) + self.zero.float().unsqueeze(3)).flatten(2, 3)
        groups = self.group_of.long()
        return codes * gather_entries(self.scale, groups).float() + gather_entries(self.zero, groups).float()

    def joined(self, newer: PackedKeys) -> PackedKeys:
        """Both, the other one's entries last."""
        ids = None
        if self.group_of is not None:
            ids = torch.cat((self.group_of, newer._explicit() + self.scale.shape[2]), 2)
        parts = (torch.cat((getattr(self, n), getattr(newer, n)), 2) for n in ("codes", "scale", "zero"))
        return PackedKeys(*parts, self.bits, self.group_size, ids)

    def take(self, index: Tensor) -> PackedKeys:
        """Only the entries ``index`` [B, H, n]; scales that no entry needs any more are dropped."""
        ids = self._explicit().gather(2, index).long()
        needed = torch.zeros(self.scale.shape[:3], dtype=torch.bool, device=ids.device).scatter_(2, ids, True)
        most = int(needed.sum(2).max())
        order = needed.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[:, :, :most]  # needed ones first, in order
        place = needed.cumsum(2) - 1
        return PackedKeys(
            gather_entries(self.codes, index),
            gather_entries(self.scale, order),
            gather_entries(self.zero, order),
            self.bits,
            self.group_size,
            place.gather(2, ids).to(torch.int32),
        )

    def heads(self, start: int, stop: int) -> PackedKeys:
        """Only these heads."""
        ids = None if self.group_of is None else self.group_of[:, start:stop].clone()
        parts = (x[:, start:stop].clone() for x in (self.codes, self.scale, self.zero))
        return PackedKeys(*parts, self.bits, self.group_size, ids)

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive."""
        return [x for x in (self.codes, self.scale, self.zero, self.group_of) if x is not None]

    def _explicit(self) -> Tensor:
        if self.group_of is not None:
            return self.group_of
        b, h, p = self.codes.shape[:3]
        ids = torch.arange(p, device=self.codes.device, dtype=torch.int32) // self.group_size
        return ids.expand(b, h, p)


@dataclass
class PackedValues:
    """Values per entry: codes [B, H, P, D * bits / 8], scale and zero [B, H, P, D / channels]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    channels: int

    @classmethod
    def of(cls, values: Tensor, bits: int, group_size: int) -> PackedValues:
        """Quantize values [B, H, n, D] in groups of at most ``group_size`` channels that divide D."""
        channels = math.gcd(group_size, values.shape[-1])
        codes, scale, zero = quantize(values.unflatten(-1, (-1, channels)), bits, dim=-1)
        return cls(pack_bits(codes.flatten(-2), bits), scale.squeeze(-1), zero.squeeze(-1), bits, channels)

    def read(self) -> Tensor:
        """Values [B, H, P, D] in float32."""
        grouped = unpack_bits(self.codes, self.bits).float().unflatten(-1, (-1, self.channels))
        return (grouped * self.scale.float().unsqueeze(-1) + self.zero.float().unsqueeze(-1)).flatten(-2)

    def joined(self, newer: PackedValues) -> PackedValues:
        """Both, the other one's entries last."""
        parts = (torch.cat(pair, 2) for pair in zip(self.tensors(), newer.tensors(), strict=True))
        return PackedValues(*parts, self.bits, self.channels)

    def take(self, index: Tensor) -> PackedValues:
        """Only the entries ``index`` [B, H, n]."""
        return PackedValues(*(gather_entries(x, index) for x in self.tensors()), self.bits, self.channels)

    def heads(self, start: int, stop: int) -> PackedValues:
        """Only these heads."""
        return PackedValues(*(x[:, start:stop].clone() for x in self.tensors()), self.bits, self.channels)

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive."""
        return [self.codes, self.scale, self.zero]


class QuantizedStore:
    """A :class:`~workers.mechanisms.kv_store.KVStore`: the oldest entries packed, the newest in full precision.

    An eviction may leave more packed entries in one head than in another. Both parts are then as wide as
    their longest head and filled from the right; ``_packed`` counts each head's packed entries.

    Args:
        keys, values: [B, H, S, D], the entries so far.
        bits: 2, 4 or 8.
        group_size: entries that share a key scale, and channels that share a value scale.
        residual: at least so many newest entries stay in full precision.
    """

    def __init__(self, keys: Tensor, values: Tensor, bits: int, group_size: int, residual: int):
        self.bits, self.group_size, self.residual = bits, group_size, residual
        self._length = keys.shape[2]
        self._recent = (keys.clone(), values.clone())
        self._keys: PackedKeys | None = None
        self._values: PackedValues | None = None
        self._packed: Tensor | None = None  # [B, H]; None = the same in every head
        self._pack()

    @property
    def length(self) -> int:
        return self._length

    @property
    def packed(self) -> float:
        """Packed entries, mean over heads."""
        return float(self._packed.float().mean()) if self._packed is not None else self._width

    @property
    def _width(self) -> int:
        return 0 if self._keys is None else self._keys.codes.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._pack()  # what is new is attended to in full precision at least once
        self._recent = (torch.cat((self._recent[0], keys), 2), torch.cat((self._recent[1], values), 2))
        self._length += keys.shape[2]

    def _pack(self) -> None:
        """Move whole groups of the oldest full-precision entries to the packed part."""
        most = self._width if self._packed is None else int(self._packed.max())
        count = (self._length - most - self.residual) // self.group_size * self.group_size
        if count <= 0:
            return
        keys, values = self._recent
        if self._packed is None:
            old = (keys[:, :, :count], values[:, :, :count])
        else:
            start = keys.shape[2] - (self._length - self._packed)
            index = start.unsqueeze(-1) + torch.arange(count, device=keys.device)
            old = (gather_entries(keys, index), gather_entries(values, index))
            self._packed = self._packed + count
        new_keys, new_values = (
            PackedKeys.of(old[0], self.bits, self.group_size),
            PackedValues.of(old[1], self.bits, self.group_size),
        )
        self._keys = new_keys if self._keys is None else self._keys.joined(new_keys)
        self._values = new_values if self._values is None else self._values.joined(new_values)
        self._recent = (keys[:, :, count:].clone(), values[:, :, count:].clone())

    def read(self) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            return self._recent
        keys, values = self._recent
        keys = torch.cat((self._keys.read().to(keys.dtype), keys), 2)
        values = torch.cat((self._values.read().to(values.dtype), values), 2)
        if self._packed is None:
            return keys, values
        entry, packed = torch.arange(self._length, device=keys.device), self._packed.unsqueeze(-1)
        offset = torch.where(entry < packed, self._width - packed, keys.shape[2] - self._length)
        return gather_entries(keys, entry + offset), gather_entries(values, entry + offset)

    def keep(self, index: Tensor) -> None:
        """Keep only the entries ``index`` [B, H, n], ascending; packed ones stay as they are."""
        n, width, recent = index.shape[2], self._width, self._recent[0].shape[2]
        before = self._packed if self._packed is not None else torch.full(index.shape[:2], width, device=index.device)
        packed = (index < before.unsqueeze(-1)).sum(2)
        least, most = (int(x) for x in packed.aminmax())
        if self._keys is not None and self._values is not None:
            place = torch.arange(most, device=index.device) - (most - packed).unsqueeze(-1)  # < 0: filling at the front
            slot = index.gather(2, place.clamp_min(0)) + (width - before).unsqueeze(-1)
            slot = slot.clamp(0, width - 1)
            self._keys, self._values = (self._keys.take(slot), self._values.take(slot)) if most else (None, None)
        slot = (index[:, :, least:] - self._length + recent).clamp_min(0)
        self._recent = (gather_entries(self._recent[0], slot), gather_entries(self._recent[1], slot))
        self._packed, self._length = (packed if least != most else None), n

    def crop(self, count: int) -> None:
        """Take back the newest ``count`` entries.

        Raises:
            RuntimeError: some of them are packed already; the store cannot give them back exactly.
        """
        most = self._width if self._packed is None else int(self._packed.max())
        if count > self._length - most:
            raise RuntimeError(f"{count} entries cannot be taken back: only {self._length - most} are in full precision")
        end = self._recent[0].shape[2] - count
        self._recent = (self._recent[0][:, :, :end].clone(), self._recent[1][:, :, :end].clone())
        self._length -= count

    def heads(self, start: int, stop: int) -> QuantizedStore:
        keys, values = (x[:, start:stop].clone() for x in self._recent)
        packed_keys = self._keys.heads(start, stop) if self._keys is not None else None
        packed_values = self._values.heads(start, stop) if self._values is not None else None
        counts = self._packed[:, start:stop] if self._packed is not None else None
        return self._with((keys, values), packed_keys, packed_values, counts)

    def clone(self) -> QuantizedStore:
        """An independent copy: no operation writes into a stored tensor, so both may share them."""
        return self._with(self._recent, self._keys, self._values, self._packed)

    def _with(
        self, recent: tuple[Tensor, Tensor], keys: PackedKeys | None, values: PackedValues | None, packed: Tensor | None
    ) -> QuantizedStore:
        twin = object.__new__(QuantizedStore)
        twin.bits, twin.group_size, twin.residual = self.bits, self.group_size, self.residual
        twin._length, twin._recent, twin._keys, twin._values, twin._packed = self._length, recent, keys, values, packed
        return twin

    def nbytes(self) -> int:
        """Codes, scales, zeros, the groups of evicted-among keys, and the full-precision rest."""
        kept = [*self._recent, *(self._keys.tensors() if self._keys else ()), *(self._values.tensors() if self._values else ())]
        return sum(storage_bytes(x) for x in kept)
