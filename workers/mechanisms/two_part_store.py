"""A cache store in two parts: old entries in a form of their own, the newest ones as they came.

An eviction may leave more old entries in one head than in another. Both parts are then as wide as their
longest head and filled from the right; ``_packed`` counts each head's old entries.

Shapes: B batch, H key-value heads, S stored entries, P old ones, n entries that stay, D head width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from workers.mechanisms.kv_store import gather_entries, storage_bytes


class Part(Protocol):
    """Old keys, or old values, of some heads. No operation writes into a stored tensor."""

    @property
    def width(self) -> int:
        """Entries P of the longest head."""
        ...

    def read(self) -> Tensor:
        """The entries [B, H, P, D]."""
        ...

    def take(self, index: Tensor) -> Self:
        """Only the entries ``index`` [B, H, n]."""
        ...

    def heads(self, start: int, stop: int) -> Self:
        """Only these heads, in memory of their own."""
        ...

    def tensors(self) -> list[Tensor]:
        """Everything that is kept alive."""
        ...


@dataclass
class Plain:
    """Entries [B, H, P, D] as they came, in memory of their own."""

    entries: Tensor

    @property
    def width(self) -> int:
        return self.entries.shape[2]

    def read(self) -> Tensor:
        return self.entries

    def take(self, index: Tensor) -> Plain:
        return Plain(gather_entries(self.entries, index))

    def heads(self, start: int, stop: int) -> Plain:
        return Plain(self.entries[:, start:stop].clone())

    def tensors(self) -> list[Tensor]:
        return [self.entries]


Keys = TypeVar("Keys", bound=Part)
Values = TypeVar("Values", bound=Part)


class TwoPartStore(Generic[Keys, Values]):
    """A :class:`~workers.mechanisms.kv_store.KVStore` of old entries, keys and values each in their form, and the newest.

    Args:
        keys, values: [B, H, n, D], the newest entries.
        old: keys and values of those before them.
    """

    def __init__(self, keys: Tensor, values: Tensor, old: tuple[Keys, Values] | None = None):
        self._recent = (keys.clone(), values.clone())
        self._old = old
        self._packed: Tensor | None = None  # [B, H]; None = the same in every head
        self._length = self._width + keys.shape[2]

    @property
    def length(self) -> int:
        return self._length

    @property
    def packed(self) -> float:
        """Old entries, mean over heads."""
        return float(self._packed.float().mean()) if self._packed is not None else self._width

    @property
    def _width(self) -> int:
        return self._old[0].width if self._old else 0

    @property
    def _most(self) -> int:
        """Old entries of the head that has most."""
        return self._width if self._packed is None else int(self._packed.max())

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._recent = (torch.cat((self._recent[0], keys), 2), torch.cat((self._recent[1], values), 2))
        self._length += keys.shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        if self._old is None:
            return self._recent
        keys, values = (torch.cat((o.read().to(r.dtype), r), 2) for o, r in zip(self._old, self._recent, strict=True))
        if self._packed is None:
            return keys, values
        entry, packed = torch.arange(self._length, device=keys.device), self._packed.unsqueeze(-1)
        offset = torch.where(entry < packed, self._width - packed, keys.shape[2] - self._length)
        return gather_entries(keys, entry + offset), gather_entries(values, entry + offset)

    def keep(self, index: Tensor) -> None:
        """Keep only the entries ``index`` [B, H, n], ascending; old ones stay in their form."""
        n, width, recent = index.shape[2], self._width, self._recent[0].shape[2]
        before = self._packed if self._packed is not None else torch.full(index.shape[:2], width, device=index.device)
        packed = (index < before.unsqueeze(-1)).sum(2)
        least, most = (int(x) for x in packed.aminmax())
        if self._old is not None:
            place = torch.arange(most, device=index.device) - (most - packed).unsqueeze(-1)  # < 0: filling at the front
            slot = index.gather(2, place.clamp_min(0)) + (width - before).unsqueeze(-1)
            slot = slot.clamp(0, width - 1)
            self._old = (self._old[0].take(slot), self._old[1].take(slot)) if most else None
        slot = (index[:, :, least:] - self._length + recent).clamp_min(0)
        self._recent = (gather_entries(self._recent[0], slot), gather_entries(self._recent[1], slot))
        self._packed, self._length = (packed if least != most else None), n

    def crop(self, count: int) -> None:
        """Take back the newest ``count`` entries.

        Raises:
            RuntimeError: some of them are old already; the store cannot give them back exactly.
        """
        if count > self._length - self._most:
            raise RuntimeError(f"{count} entries cannot be taken back: only {self._length - self._most} are in full precision")
        end = self._recent[0].shape[2] - count
        self._recent = (self._recent[0][:, :, :end].clone(), self._recent[1][:, :, :end].clone())
        self._length -= count

    def heads(self, start: int, stop: int) -> Self:
        part = copy.copy(self)
        part._recent = (self._recent[0][:, start:stop].clone(), self._recent[1][:, start:stop].clone())
        part._old = (self._old[0].heads(start, stop), self._old[1].heads(start, stop)) if self._old else None
        part._packed = self._packed[:, start:stop] if self._packed is not None else None
        return part

    def clone(self) -> Self:
        """An independent copy: no operation writes into a stored tensor, so both may share them."""
        return copy.copy(self)

    def nbytes(self) -> int:
        """Everything that makes up the old entries, and the newest ones."""
        kept = [*self._recent, *(x for part in self._old or () for x in part.tensors())]
        return sum(storage_bytes(x) for x in kept)
