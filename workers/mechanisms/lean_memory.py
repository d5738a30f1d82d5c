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
from workers.mechanisms.kv_store import FloatStore


class Memory(Structure):
    """What a head of a layer remembers, as the kernel sees it (``memory`` in lean_attention.h)."""

    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("row", c_int64), ("length", c_int64))


Room = tuple[FloatStore, Tensor, Tensor]


class Memories:
    """What all heads of some layers remember, where that is plain floats, read whole, with room for one more entry.

    Args:
        groups: the groups of heads of these layers, in their order.
        rooms: where the entries of each are: its store, keys and values [B, H, room, D].
    """

    def __init__(self, groups: Sequence[HeadGroup], rooms: Sequence[Room]):
        self.heads = (Memory * sum(keys.shape[1] for _, keys, _ in rooms))()
        self.lengths = np.frombuffer(self.heads, dtype=np.int64).reshape(len(self.heads), -1)[:, 3]  # one write for all
        at = 0
        for _, keys, values in rooms:
            gap = keys.stride(1) * keys.element_size()
            for head in range(keys.shape[1]):
                self.heads[at] = Memory(keys.data_ptr() + head * gap, values.data_ptr() + head * gap, keys.stride(0))
                at += 1
        self.count(groups, rooms)

    def count(self, groups: Sequence[HeadGroup], rooms: Sequence[Room]) -> None:
        """Take the lengths of now."""
        lengths = [store.length for store, _, _ in rooms]
        self.rooms = rooms
        self.known = [(g, *room, n) for g, room, n in zip(groups, rooms, lengths, strict=True)]
        self.lengths[:] = [n for g, n in zip(groups, lengths, strict=True) for _ in range(g.start, g.stop)]
        self.free = min(keys.shape[2] - n for (_, keys, _), n in zip(rooms, lengths, strict=True))
        self.added = 0

    @classmethod
    def of(cls, layers: Sequence[KVLayer], shape: tuple[int, int, int], before: Memories | None) -> Memories | None:
        """The memories of these layers; None where one of them is of another kind.

        Args:
            shape: rows, heads of a layer and their width.
            before: those of the last step, used again where nothing moved.
        """
        groups = [g for layer in layers for g in layer.groups]
        if before is not None and before.goes_on(groups):
            return before
        found = [g.room() for g in groups]
        rooms = [room for room in found if room is not None]
        if len(rooms) < len(groups) or any(layer.heads != shape[1] for layer in layers):
            return None
        if before is not None and before.is_at(rooms):
            before.count(groups, rooms)
            return before
        rows, _, width = shape
        if not all(is_row(k) and is_row(v) and k.shape == v.shape and k.shape[::3] == (rows, width) for _, k, v in rooms):
            return None
        return cls(groups, rooms)

    def is_at(self, rooms: Sequence[Room]) -> bool:
        """True if the entries are where they were."""
        return len(rooms) == len(self.rooms) and all(
            here is there for old, new in zip(self.rooms, rooms, strict=True) for here, there in zip(old, new, strict=True)
        )

    def goes_on(self, groups: Sequence[HeadGroup]) -> bool:
        """True if nothing happened to what these groups hold but what :meth:`wrote` told them, and there is room."""
        added = self.added
        if added >= self.free or len(groups) != len(self.known):
            return False
        for there, (here, store, keys, values, length) in zip(groups, self.known, strict=True):
            if there is not here or here.store is not store or not store.is_in(keys, values, length + added) or here.is_followed:
                return False
        return True

    def wrote(self, layers: Sequence[KVLayer], forward: Forward) -> None:
        """The next entry of every head was written: the cache learns of it."""
        for group, store, *_ in self.known:
            store.wrote()
            if group.positions is not None:
                group.place(forward.positions)
        for layer in layers:
            layer.seen = forward.seen
        self.added += 1
        self.lengths += 1


def is_row(x: Tensor) -> bool:
    """True if the kernels can read it."""
    return x.dtype == torch.float32 and x.is_contiguous()
