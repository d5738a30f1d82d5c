"""The key-value cache: one protocol for every policy, every layer, every head.

A :class:`StudioCache` is a list of :class:`KVLayer`. A layer holds one or more
:class:`HeadGroup`; heads of one group hold the same number of positions. A fresh layer has one
group with all heads; after a head-wise eviction it has one group a head, each of its own length,
and the bytes of what was evicted are really gone. How a group stores its numbers is behind
:class:`KVStore`, so a quantized store and an evictor never know of each other.

Positions are logical: an entry keeps the position it had in the text, so rotary embeddings and
masks stay right after an eviction, and ``get_seq_length`` answers with what was *seen*.

Shapes: B batch, H key-value heads, S stored entries, T new tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

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
    """Rows ``index`` [B, H, n] of ``x`` [B, H, S, D] along S: [B, H, n, D], in fresh memory."""
    return x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


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
            self._keys[:, :, self._length : total] = keys
            self._values[:, :, self._length : total] = values
        else:
            self._grow(keys, values, total)
        self._length = total

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
        return self._keys[:, :, : self._length], self._values[:, :, : self._length]

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


@dataclass
class HeadGroup:
    """Heads ``start`` to ``stop`` that hold the same number of entries.

    Attributes:
        positions: [B, 1 or H, S] logical positions; None = 0, 1, 2, ... with no padding.
        tracked: tensors [B, H, S] that follow the entries (accumulated scores, for example);
            new entries start at 0, evicted ones vanish.
    """

    start: int
    stop: int
    store: KVStore
    positions: Tensor | None = None
    padded: bool = False
    tracked: dict[str, Tensor] = field(default_factory=dict)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor | None) -> None:
        """Add keys and values of these heads [B, H, T, D] at ``positions`` [B, T] (None = next ones)."""
        self.store.append(keys, values)
        if self.positions is not None and positions is not None:
            new = positions[:, None, :].expand(-1, self.positions.shape[1], -1)
            self.positions = torch.cat((self.positions, new), 2)
        for name, x in self.tracked.items():
            self.tracked[name] = torch.nn.functional.pad(x, (0, keys.shape[2]))

    def logical(self, batch: int, device: torch.device) -> Tensor:
        """Positions [B, 1 or H, S], made explicit."""
        if self.positions is None:
            return torch.arange(self.store.length, device=device).expand(batch, 1, -1)
        return self.positions

    def keep(self, index: Tensor) -> None:
        """Keep only the entries ``index`` [B, H, n]."""
        positions = self.logical(index.shape[0], index.device)
        self.positions = positions.expand(-1, index.shape[1], -1).gather(2, index)
        self.store.keep(index)
        self.tracked = {name: x.gather(2, index) for name, x in self.tracked.items()}

    def crop(self, count: int) -> None:
        """Take back the newest ``count`` entries."""
        self.store.crop(count)
        n = self.store.length
        if self.positions is not None:
            self.positions = self.positions[:, :, :n]
        self.tracked = {name: x[:, :, :n] for name, x in self.tracked.items()}

    def part(self, head: int) -> HeadGroup:
        """A group with only the head ``head`` (counted within this group)."""
        positions = self.positions
        if positions is not None and positions.shape[1] > 1:
            positions = positions[:, head : head + 1].clone()
        tracked = {name: x[:, head : head + 1].clone() for name, x in self.tracked.items()}
        return HeadGroup(
            self.start + head, self.start + head + 1, self.store.heads(head, head + 1), positions, self.padded, tracked
        )

    def clone(self) -> HeadGroup:
        """An independent copy."""
        return HeadGroup(self.start, self.stop, self.store.clone(), self.positions, self.padded, dict(self.tracked))


class KVLayer(CacheLayerMixin):
    """What one attention layer remembers."""

    is_sliding = False

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self.groups: list[HeadGroup] = []
        self.seen = 0
        self.capacity = capacity
        self.query_tail: Tensor | None = None  # [B, Hq, W, D], the newest queries of earlier chunks

    # -- what the library asks -------------------------------------------------------------
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do before the first append."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Hand the new states through: the attention function appends them, with their positions."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Positions seen, evicted ones included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(entries a mask must cover, first position); masks are really built in the attention function."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    # -- what mechanisms use ---------------------------------------------------------------
    def append(self, keys: Tensor, values: Tensor, positions: Tensor | None, seen: int, padded: bool = False) -> None:
        """Store new keys and values [B, H, T, D].

        Args:
            positions: [B, T] logical positions, needed once a layer has gaps or padding.
            seen: positions seen by the model after this forward.
            padded: some of these positions are padding.
        """
        if not self.groups:
            group = HeadGroup(0, keys.shape[1], FloatStore(self.capacity), padded=padded)
            group.append(keys, values, None)
            gaps = positions is not None and (padded or keys.shape[2] != seen)
            group.positions = positions[:, None, :] if gaps and positions is not None else None
            self.groups, self.is_initialized = [group], True
        elif len(self.groups) == 1:
            self.groups[0].append(keys, values, positions)
        else:
            for g in self.groups:
                g.append(keys[:, g.start : g.stop], values[:, g.start : g.stop], positions)
        self.seen = seen

    @property
    def group(self) -> HeadGroup:
        """The only group.

        Raises:
            RuntimeError: the heads of this layer differ in length.
        """
        if len(self.groups) != 1:
            raise RuntimeError("this layer holds heads of different lengths; use .groups")
        return self.groups[0]

    @property
    def stored(self) -> float:
        """Entries stored, mean over heads."""
        heads = self.groups[-1].stop if self.groups else 1
        return sum(g.store.length * (g.stop - g.start) for g in self.groups) / heads

    def keep(self, index: Tensor | Sequence[Tensor]) -> None:
        """Evict everything but ``index``.

        Args:
            index: [B, H, n] entries to keep per head, or one tensor [B, n_h] a head, whose lengths
                may differ; ascending. The bytes of the other entries are freed.
        """
        if isinstance(index, Tensor):
            if len(self.groups) == 1:
                self.group.keep(index)
                return
            index = [index[:, h] for h in range(index.shape[1])]
        if len(self.groups) == 1:
            whole = self.groups[0]
            self.groups = [whole.part(h) for h in range(whole.stop - whole.start)]
        for g, kept in zip(self.groups, index, strict=True):
            g.keep(kept[:, None, :])

    def crop_newest(self, count: int) -> None:
        """Take back the newest ``count`` entries."""
        for g in self.groups:
            g.crop(count)
        self.seen -= count

    def nbytes(self) -> int:
        """Bytes of keys and values with scales."""
        return sum(g.store.nbytes() for g in self.groups)

    def clone(self) -> KVLayer:
        """An independent copy."""
        twin = KVLayer(self.capacity)
        twin.groups, twin.seen, twin.query_tail = [g.clone() for g in self.groups], self.seen, self.query_tail
        twin.is_initialized = self.is_initialized
        return twin


class StudioCache(Cache):
    """The cache of one batch: a list of :class:`KVLayer`, made for a known number of layers."""

    def __init__(self, layers: int, capacity: int = 0):
        super().__init__(layers=[KVLayer(capacity) for _ in range(layers)])

    layers: list[KVLayer]

    @property
    def seen(self) -> int:
        """Positions the model has seen."""
        return self.layers[0].seen if self.layers else 0

    def nbytes(self) -> int:
        """Bytes of all stored keys and values with scales."""
        return sum(layer.nbytes() for layer in self.layers)

    def stored(self) -> float:
        """Entries stored, mean over layers and heads."""
        return sum(layer.stored for layer in self.layers) / max(1, len(self.layers))

    def crop_newest(self, count: int) -> None:
        """Take back the newest ``count`` positions in every layer (speculative decoding)."""
        if count:
            for layer in self.layers:
                layer.crop_newest(count)

    def reserve(self, extra: int) -> None:
        """Make room for ``extra`` more entries in every float store."""
        for layer in self.layers:
            for g in layer.groups:
                if isinstance(g.store, FloatStore):
                    g.store.reserve(g.store.length + extra)

    def clone(self) -> StudioCache:
        """An independent copy, for scoring several continuations of one context."""
        twin = StudioCache(0)
        twin.layers = [layer.clone() for layer in self.layers]
        return twin
