"""How one head group stores its keys and values: the protocol, and the plain store.

Shapes: B batch, H key-value heads, S stored entries, T new tokens, D head width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

PADDING = -1  # position of an entry that no query may see


class KVStore(Protocol):
    """How one head group stores keys and values."""

    @property
    def length(self) -> int:
        """Stored entries S."""
        ...

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add keys and values [B, H, T, D]."""
        ...

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D] in the compute dtype."""
        ...

    def keep(self, index: Tensor) -> None:
        """Keep only the entries ``index`` [B, H, n], in that order."""
        ...

    def crop(self, count: int) -> None:
        """Take back the newest ``count`` entries."""
        ...

    def heads(self, start: int, stop: int) -> KVStore:
        """A store of its own with only these heads."""
        ...

    def clone(self) -> KVStore:
        """An independent copy."""
        ...

    def nbytes(self) -> int:
        """Bytes of all storages this store keeps alive, scales included."""
        ...


def gather_entries(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [B, H, n] of ``x`` [B, H, S, D] along S: [B, H, n, D], in fresh memory.

    Where the rows stand in one table, they are copied whole; ``gather`` would go number by number.
    """
    (_, h, s, d), (_, head, row, one) = x.shape, x.stride()
    if len(x) == 1 and (row, one) == (d, 1) and head % d == 0 and s:
        gap = head // d  # rows from one head to the next
        table = x.as_strided(((h - 1) * gap + s, d), (d, 1))
        places = index[0] + gap * torch.arange(h, device=x.device)[:, None]
        return table.index_select(0, places.view(-1)).view(1, h, -1, d)
    return x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, d))


class FloatStore:
    """Keys and values as they come.

    Args:
        capacity: entries to allocate ahead. 0 grows by concatenation at every append, as the
            library's own cache does; a runtime policy reserves room instead.
    """

    def __init__(self, capacity: int = 0):
        self.capacity = capacity
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    def append(self, keys: Tensor, values: Tensor) -> None:
        total = self._length + keys.shape[2]
        if self._keys is None and total >= self.capacity:
            self._keys, self._values = _own(keys), _own(values)
        elif self._keys is not None and total <= self._keys.shape[2]:
            self._keys.narrow(2, self._length, keys.shape[2]).copy_(keys)  # narrow: fewer Python steps than indexing
            self._values.narrow(2, self._length, keys.shape[2]).copy_(values)
        elif self._keys is not None and total >= self.capacity and self._keys.shape[2] == self._length:
            self._keys, self._values = torch.cat((self._keys, keys), 2), torch.cat((self._values, values), 2)
        else:
            self._grow(keys, values, total)
        self._length = total

    def room(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values [B, H, >= S + 1, D] with room for the next entry behind those stored; None = there is none."""
        if self._keys is None or self._values is None or self._length >= self._keys.shape[2]:
            return None
        return self._keys, self._values

    def is_in(self, keys: Tensor, values: Tensor, length: int) -> bool:
        """True if these are the tensors that hold the entries, ``length`` of them."""
        return self._keys is keys and self._values is values and self._length == length

    def wrote(self) -> None:
        """The next entry was written into :meth:`room` by someone else."""
        self._length += 1

    def _grow(self, keys: Tensor, values: Tensor, total: int) -> None:
        old_k, old_v = (
            (x[:, :, : self._length] for x in (self._keys, self._values))
            if self._keys is not None
            else (keys[:, :, :0], values[:, :, :0])
        )
        if total >= self.capacity:
            self._keys, self._values = torch.cat((old_k, keys), 2), torch.cat((old_v, values), 2)
            return
        b, h, _, d = keys.shape
        room_k, room_v = keys.new_zeros(b, h, self.capacity, d), values.new_zeros(b, h, self.capacity, values.shape[-1])
        for room, old, new in ((room_k, old_k, keys), (room_v, old_v, values)):
            room[:, :, : self._length] = old
            room[:, :, self._length : total] = new
        self._keys, self._values = room_k, room_v

    def read(self) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            raise RuntimeError("the cache was read before anything was stored")
        if self._keys.shape[2] == self._length:
            return self._keys, self._values
        return self._keys.narrow(2, 0, self._length), self._values.narrow(2, 0, self._length)

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` entries now, so that later appends copy nothing."""
        if self._keys is None or capacity <= self._keys.shape[2]:
            self.capacity = max(self.capacity, capacity)
            return
        keys, values = self.read()
        self.capacity, self._keys, self._values = capacity, None, None
        length, self._length = self._length, 0
        self._grow(keys, values, length)
        self._length = length

    def keep(self, index: Tensor) -> None:
        keys, values = self.read()
        self._keys, self._values = gather_entries(keys, index), gather_entries(values, index)
        self._length, self.capacity = index.shape[2], 0

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Put these [B, H, S, D] in the place of all stored entries."""
        for old, new in zip(self.read(), (keys, values), strict=True):
            old.copy_(new)

    def crop(self, count: int) -> None:
        self._length -= count  # the room stays and is written again by the next append

    def heads(self, start: int, stop: int) -> FloatStore:
        keys, values = self.read()
        part = FloatStore()
        part._keys, part._values, part._length = keys[:, start:stop].clone(), values[:, start:stop].clone(), self._length
        return part

    def clone(self) -> FloatStore:
        twin = FloatStore(self.capacity)
        twin._length = self._length
        if self._keys is not None and self._values is not None:
            twin._keys, twin._values = self._keys.clone(), self._values.clone()
        return twin

    def nbytes(self) -> int:
        return sum(storage_bytes(x) for x in (self._keys, self._values) if x is not None)


def _own(x: Tensor) -> Tensor:
    """The tensor itself, or a copy if it is a window into something larger."""
    return x if storage_bytes(x) == x.nbytes else x.clone()


def storage_bytes(x: Tensor) -> int:
    """Bytes that a tensor keeps alive: its whole storage, not only the part it shows."""
    return x.untyped_storage().nbytes()
