"""A cache store with packed integers: old entries in few bits, the newest ones as they came.

Keys are quantized per channel over groups of entries, values per entry over groups of channels, both
asymmetric: ``x = code * scale + zero``. Nothing that is packed is ever quantized again: an eviction
moves codes, and every key remembers the group its scale belongs to.

Shapes: B batch, H key-value heads, S stored entries, P packed ones, D head width, G key groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from studio_state.errors import SpecError
from workers.mechanisms.attention import Forward
from workers.mechanisms.cache import StudioCache
from workers.mechanisms.held import Held
from workers.mechanisms.kv_store import gather_entries
from workers.mechanisms.two_part_store import Part, TwoPartStore
from workers.session import Session

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
    """Inverse of :func:`pack_bits`: the codes of a byte are spread over the bytes of one larger number."""
    if bits == 8:
        return packed
    if bits == 4:
        wide = packed.to(torch.int16)
        return wide.bitwise_or_(wide << 4).bitwise_and_(0x0F0F).view(torch.uint8)
    wide = packed.to(torch.int32)
    wide.bitwise_or_(wide << 6).bitwise_or_(wide << 12)
    return wide.bitwise_and_(0x03030303).view(torch.uint8)


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


def still_needed(ids: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """What is left of things that entries share, once some entries are gone.

    Args:
        ids: [B, H, n], the thing of each entry that stays.
        groups: how many things there were.

    Returns:
        Things to keep [B, H, <= groups], ascending (some head needs them all), and the new ids [B, H, n] int32.
    """
    ids = ids.long()
    needed = torch.zeros(*ids.shape[:2], groups, dtype=torch.bool, device=ids.device).scatter_(2, ids, True)
    order = needed.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[:, :, : int(needed.sum(2).max())]
    return order, (needed.cumsum(2) - 1).gather(2, ids).to(torch.int32)


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

    @property
    def width(self) -> int:
        return self.codes.shape[2]

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
            return grouped.mul_(self.scale.float().unsqueeze(3)).add_(self.zero.float().unsqueeze(3)).flatten(2, 3)
        groups = self.group_of.long()
        return codes.mul_(gather_entries(self.scale, groups)).add_(gather_entries(self.zero, groups))

    def joined(self, newer: PackedKeys) -> PackedKeys:
        """Both, the other one's entries last."""
        ids = None
        if self.group_of is not None:
            ids = torch.cat((self.group_of, newer._explicit() + self.scale.shape[2]), 2)
        parts = (torch.cat((getattr(self, n), getattr(newer, n)), 2) for n in ("codes", "scale", "zero"))
        return PackedKeys(*parts, self.bits, self.group_size, ids)

    def take(self, index: Tensor) -> PackedKeys:
        """Only the entries ``index`` [B, H, n]; scales that no entry needs any more are dropped."""
        order, ids = still_needed(self._explicit().gather(2, index), self.scale.shape[2])
        return PackedKeys(
            gather_entries(self.codes, index),
            gather_entries(self.scale, order),
            gather_entries(self.zero, order),
            self.bits,
            self.group_size,
            ids,
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

    @property
    def width(self) -> int:
        return self.codes.shape[2]

    @staticmethod
    def channels_of(group_size: int, width: int) -> int:
        """Channels that share a scale: at most ``group_size``, and a divisor of the head width."""
        return math.gcd(group_size, width)

    @classmethod
    def of(cls, values: Tensor, bits: int, group_size: int) -> PackedValues:
        """Quantize values [B, H, n, D] in groups of at most ``group_size`` channels that divide D."""
        channels = cls.channels_of(group_size, values.shape[-1])
        codes, scale, zero = quantize(values.unflatten(-1, (-1, channels)), bits, dim=-1)
        return cls(pack_bits(codes.flatten(-2), bits), scale.squeeze(-1), zero.squeeze(-1), bits, channels)

    def read(self) -> Tensor:
        """Values [B, H, P, D] in float32."""
        grouped = unpack_bits(self.codes, self.bits).float().unflatten(-1, (-1, self.channels))
        return grouped.mul_(self.scale.float().unsqueeze(-1)).add_(self.zero.float().unsqueeze(-1)).flatten(-2)

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


class GrowingPart(Part, Protocol):
    """Old keys or values to which more are added."""

    def joined(self, newer: Self) -> Self:
        """Both, the other one's entries last."""
        ...


class QuantizedStore(TwoPartStore[Any, Any]):
    """The oldest entries packed, the newest in full precision; whole groups are packed as entries come.

    Args:
        keys, values: [B, H, S, D], the entries so far.
        bits: 2, 4 or 8.
        group_size: entries that share a key scale, and channels that share a value scale.
        residual: at least so many newest entries stay in full precision.
    """

    def __init__(self, keys: Tensor, values: Tensor, bits: int, group_size: int, residual: int):
        super().__init__(keys, values)
        self.bits, self.group_size, self.residual = bits, group_size, residual
        self._pack()

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._pack()  # what is new is attended to in full precision at least once
        super().append(keys, values)

    def _form(self, keys: Tensor, values: Tensor) -> tuple[GrowingPart, GrowingPart]:
        """Whole groups of entries [B, H, n, D], packed."""
        return PackedKeys.of(keys, self.bits, self.group_size), PackedValues.of(values, self.bits, self.group_size)

    def _pack(self) -> None:
        """Move whole groups of the oldest full-precision entries to the packed part."""
        count = (self._length - self._most - self.residual) // self.group_size * self.group_size
        if count <= 0:
            return
        keys, values = self._recent
        if self._packed is None:
            old = self._form(keys[:, :, :count], values[:, :, :count])
        else:
            start = keys.shape[2] - (self._length - self._packed)
            index = start.unsqueeze(-1) + torch.arange(count, device=keys.device)
            old = self._form(gather_entries(keys, index), gather_entries(values, index))
            self._packed = self._packed + count
        self._old = (self._old[0].joined(old[0]), self._old[1].joined(old[1])) if self._old else old
        self._recent = (keys[:, :, count:].clone(), values[:, :, count:].clone())


@contextmanager
def quantizing(session: Session, policy: str, bits: int, pack: Callable[[Held], QuantizedStore]) -> Iterator[None]:
    """Pack the cache once every evictor has acted on the prompt, and tell the share that is packed.

    Args:
        bits: of a stored number.
        pack: what a head group holds -> the store that holds it from then on.

    Raises:
        SpecError: at the first prefill, if a head's numbers of so many bits do not fill whole bytes.
    """

    def account(cache: StudioCache, forward: Forward) -> None:
        share = quantized_share(cache)
        session.counts["quantized_kv_share"] = share
        if share:
            session.did(policy, share)

    def store(cache: StudioCache, forward: Forward) -> None:
        for group in (g for layer in cache.layers for g in layer.groups):
            held = group.held()
            for width in (held.keys.shape[-1], held.values.shape[-1]):
                if width * bits % 8:
                    raise SpecError(f"{policy}: bits = {bits} does not fill whole bytes at head width {width}; set bits = 8")
            group.store = pack(held)
        account(cache, forward)

    with session.hooked(session.storage, store), session.hooked(session.after_step, account):
        yield


def quantized_share(cache: StudioCache) -> float:
    """Share of the stored entries that are packed."""
    stores = [(g.store, g.stop - g.start) for layer in cache.layers for g in layer.groups]
    packed = sum(s.packed * heads for s, heads in stores if isinstance(s, QuantizedStore))
    return packed / max(1, sum(s.length * heads for s, heads in stores))
