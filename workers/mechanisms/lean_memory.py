"""What lean layers remember, as the kernel sees it, where that is plain.

Shapes: B batch, H key-value heads, S stored entries, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_int64, c_void_p

import numpy as np
import torch
from torch import Tensor

from workers.mechanisms.attention import Forward
from workers.mechanisms.cache import HeadGroup, KVLayer


class Memory(Structure):
    """What a head of a layer remembers, as the kernel sees it (``memory`` in lean_attention.h)."""

    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("row", c_int64), ("length", c_int64))


class Memories:
    """What all heads of some layers remember, where that is plain floats, read whole, with room for one more entry.

    Args:
        layers: the layers, whose groups of heads are in their order.
        rooms: where the entries of each group are: keys and values [B, H, room, D].
    """

    def __init__(self, layers: Sequence[KVLayer], rooms: Sequence[tuple[Tensor, Tensor]]):
        self.rooms = rooms
        self.heads = (Memory * sum(keys.shape[1] for keys, _ in rooms))()
        self.lengths = np.frombuffer(self.heads, dtype=np.int64).reshape(len(self.heads), -1)[:, 3]  # one write for all
        at = 0
        for keys, values in rooms:
            gap = keys.stride(1) * keys.element_size()
            for head in range(keys.shape[1]):
                self.heads[at] = Memory(keys.data_ptr() + head * gap, values.data_ptr() + head * gap, keys.stride(0))
                at += 1
        self.count(layers)

    def count(self, layers: Sequence[KVLayer]) -> None:
        """Take the lengths of now."""
        self.groups = groups_of(layers)
        self.known = [g.store.length for g in self.groups]
        self.lengths[:] = [n for g, n in zip(self.groups, self.known, strict=True) for _ in range(g.start, g.stop)]
        self.free = min(keys.shape[2] - n for (keys, _), n in zip(self.rooms, self.known, strict=True))
        self.added = 0

    @classmethod
    def of(cls, layers: Sequence[KVLayer], shape: tuple[int, int, int], before: Memories | None) -> Memories | None:
        """The memories of these layers; None where one of them is of another kind.

        Args:
            shape: rows, heads of a layer and their width.
            before: those of the last step, used again where nothing moved.
        """
        if before is not None and before.goes_on(layers):
            return before
        rooms = [g.room() for g in groups_of(layers)]
        if before is None or not before.is_at(rooms):
            plain = [room for room in rooms if room is not None]
            if len(plain) < len(rooms) or any(layer.heads != shape[1] for layer in layers):
                return None
            rows, _, width = shape
            if not all(is_row(k) and is_row(v) and k.shape == v.shape and k.shape[::3] == (rows, width) for k, v in plain):
                return None
            return cls(layers, plain)
        before.count(layers)
        return before

    def is_at(self, rooms: Sequence[tuple[Tensor, Tensor] | None]) -> bool:
        """True if the entries are where they were."""
        return len(rooms) == len(self.rooms) and all(
            there is not None and here[0] is there[0] and here[1] is there[1]
            for here, there in zip(self.rooms, rooms, strict=True)
        )

    def goes_on(self, layers: Sequence[KVLayer]) -> bool:
        """True if nothing happened to the memories of these layers but what :meth:`wrote` told them, and there is room."""
        groups = groups_of(layers)
        if self.added >= self.free or len(groups) != len(self.groups):
            return False
        added = self.added
        return all(
            there is here and there.is_plain(keys, values, known + added)
            for here, there, (keys, values), known in zip(self.groups, groups, self.rooms, self.known, strict=True)
        )

    def wrote(self, layers: Sequence[KVLayer], forward: Forward) -> None:
        """The next entry of every head was written: the cache learns of it."""
        for g in self.groups:
            g.wrote(forward.positions)
        for layer in layers:
            layer.seen = forward.seen
        self.added += 1
        self.lengths += 1


def groups_of(layers: Sequence[KVLayer]) -> list[HeadGroup]:
    """The groups of heads of these layers."""
    return [g for layer in layers for g in layer.groups]


def is_row(x: Tensor) -> bool:
    """True if the kernels can read it."""
    return x.dtype == torch.float32 and x.is_contiguous()
