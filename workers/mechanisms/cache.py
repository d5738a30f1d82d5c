"""The key-value cache: one protocol for every policy, every layer, every head.

A :class:`StudioCache` is a list of :class:`KVLayer`. A layer holds one or more
:class:`HeadGroup`; heads of one group hold the same number of positions. A fresh layer has one
group with all heads; after a head-wise eviction it has one group a head, each of its own length,
and the bytes of what was evicted are really gone. How a group stores its numbers is behind
:class:`~workers.mechanisms.kv_store.KVStore`, so a quantized store and an evictor never know of each other.

Positions are logical: an entry keeps the position it had in the text, so rotary embeddings and
masks stay right after an eviction, and ``get_seq_length`` answers with what was *seen*.

Shapes: B batch, H key-value heads, S stored entries, T new tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from studio_state.errors import SpecError
from workers.mechanisms.held import Held, rectangle
from workers.mechanisms.kv_store import PADDING, FloatStore, KVStore
from workers.mechanisms.pages import Pages

__all__ = ["PADDING", "HeadGroup", "KVLayer", "StudioCache"]


@dataclass
class HeadGroup:
    """Heads ``start`` to ``stop`` that hold the same number of entries.

    Attributes:
        positions: [B, 1 or H, S] logical positions; None = 0, 1, 2, ... with no padding.
        tracked: tensors [B, H, S] that follow the entries (accumulated scores, for example);
            new entries start at 0, evicted ones vanish.
        pages: bounds of the keys of each page of entries, as these came; None = nobody asks for them.
    """

    start: int
    stop: int
    store: KVStore
    positions: Tensor | None = None
    padded: bool = False
    tracked: dict[str, Tensor] = field(default_factory=dict)
    pages: Pages | None = None

    def append(self, keys: Tensor, values: Tensor, positions: Tensor | None) -> None:
        """Add keys and values of these heads [B, H, T, D] at ``positions`` [B, T] (None = next ones)."""
        self.store.append(keys, values)
        if positions is not None:
            self.place(positions)
        for name, x in self.tracked.items():
            self.tracked[name] = torch.nn.functional.pad(x, (0, keys.shape[2]))
        if self.pages is not None:
            self.pages = self.pages.joined(keys)

    @property
    def is_followed(self) -> bool:
        """True if something but its position follows an entry, or some are none."""
        return bool(self.tracked) or self.padded or self.pages is not None

    def room(self) -> tuple[FloatStore, Tensor, Tensor] | None:
        """The store, its keys and values [B, H, >= S + 1, D] where the next entry may be written, to be told to it and to
        :meth:`place`; None where appending is more than that.
        """
        if self.is_followed or not isinstance(self.store, FloatStore):
            return None
        room = self.store.room()
        return None if room is None else (self.store, *room)

    def place(self, positions: Tensor) -> None:
        """Note positions [B, T] of new entries, where they do not simply follow."""
        if self.positions is not None:
            new = positions[:, None, :].expand(-1, self.positions.shape[1], -1)
            self.positions = torch.cat((self.positions, new), 2)

    def logical(self, batch: int, device: torch.device) -> Tensor:
        """Positions [B, 1 or H, S], made explicit."""
        if self.positions is None:
            return torch.arange(self.store.length, device=device).expand(batch, 1, -1)
        return self.positions

    def held(self) -> Held:
        """What is stored, as it is read."""
        return Held(*self.store.read(), self.positions, self.padded, (), self.tracked)

    def keep(self, index: Tensor) -> None:
        """Keep only the entries ``index`` [B, H, n]; below 0 = no entry, its place becomes padding."""
        positions = self.logical(index.shape[0], index.device).expand(-1, index.shape[1], -1)
        if bool((index < 0).any()):
            empty, index = index < 0, index.clamp_min(0)
            self.positions, self.padded = positions.gather(2, index).masked_fill(empty, PADDING), True
        else:
            self.positions = positions.gather(2, index)
        self.store.keep(index)
        self.tracked = {name: x.gather(2, index) for name, x in self.tracked.items()}
        self.page_anew()

    def crop(self, count: int) -> None:
        """Take back the newest ``count`` entries."""
        self.store.crop(count)
        n = self.store.length
        if self.positions is not None:
            self.positions = self.positions[:, :, :n]
        self.tracked = {name: x[:, :, :n] for name, x in self.tracked.items()}
        self.page_anew()

    def page_anew(self) -> None:
        """Bound the pages of what is stored now."""
        if self.pages is not None:
            self.pages = Pages.of(self.held(), self.pages.size)

    def part(self, head: int) -> HeadGroup:
        """A group with only the head ``head`` (counted within this group)."""
        positions = self.positions
        if positions is not None and positions.shape[1] > 1:
            positions = positions[:, head : head + 1].clone()
        tracked = {name: x[:, head : head + 1].clone() for name, x in self.tracked.items()}
        pages = None if self.pages is None else self.pages.heads(head, head + 1)
        return HeadGroup(
            self.start + head, self.start + head + 1, self.store.heads(head, head + 1), positions, self.padded, tracked, pages
        )

    def clone(self) -> HeadGroup:
        """An independent copy."""
        store, tracked = self.store.clone(), dict(self.tracked)
        return HeadGroup(self.start, self.stop, store, self.positions, self.padded, tracked, self.pages)

    def nbytes(self) -> int:
        """Bytes of keys and values with scales, and of the bounds of their pages."""
        return self.store.nbytes() + (self.pages.nbytes() if self.pages else 0)


class KVLayer(CacheLayerMixin):
    """What one attention layer remembers."""

    is_sliding = False
    keeps_kv = True  # False: a layer with a running state only

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self.groups: list[HeadGroup] = []
        self.seen = 0
        self.capacity = capacity
        self.query_tail: tuple[Tensor, Tensor] | None = None  # newest queries [B, Hq, W, D] of earlier forwards, positions [B, W]
        self.notes: dict[
            str, Any
        ] = {}  # what policies know of the layer as a whole; replaced, never changed, so clones can share it

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

    def held(self) -> Held:
        """What all heads hold, as one rectangle."""
        return rectangle(self.groups)

    def track(self, name: str, values: Tensor) -> None:
        """Let ``values`` [B, H, S] follow the entries from now on, S as in :meth:`held`."""
        for g in self.groups:
            g.tracked[name] = values[:, g.start : g.stop, values.shape[2] - g.store.length :]

    @property
    def heads(self) -> int:
        """Key-value heads; 0 while nothing is stored."""
        return self.groups[-1].stop if self.groups else 0

    @property
    def stored(self) -> float:
        """Entries stored, mean over heads."""
        heads = self.heads or 1
        return sum(g.store.length * (g.stop - g.start) for g in self.groups) / heads

    def keep(self, index: Tensor | Sequence[Tensor]) -> None:
        """Evict everything but ``index``.

        Args:
            index: [B, H, n] entries to keep per head, or one tensor [B, n_h] a head, whose lengths
                may differ; places in :meth:`held`, ascending, below 0 = no entry. The bytes of the
                other entries are freed.
        """
        if isinstance(index, Tensor) and len(self.groups) == 1:
            self.group.keep(index)
            return
        if isinstance(index, Tensor):
            index = [index[:, h] for h in range(index.shape[1])]
        lengths = [g.store.length for g in self.groups for _ in range(g.start, g.stop)]
        self.groups = [g.part(h) for g in self.groups for h in range(g.stop - g.start)]
        for g, kept, length in zip(self.groups, index, lengths, strict=True):
            g.keep((kept - (max(lengths) - length))[:, None, :])  # filling of the rectangle falls below 0

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Put these keys and values [B, H, S, D] in the place of those held, S as in :meth:`held`.

        Raises:
            SpecError: some are stored in a format that cannot be written.
        """
        for g in self.groups:
            if not isinstance(g.store, FloatStore):
                raise SpecError(
                    f"cached entries are stored as {type(g.store).__name__} and cannot be merged any more; "
                    "merge at the end of the prompt only (when = prefill), or remove the policy that packs the cache"
                )
            heads, newest = slice(g.start, g.stop), slice(keys.shape[2] - g.store.length, None)
            g.store.write(keys[:, heads, newest], values[:, heads, newest])
            g.page_anew()

    def crop_newest(self, count: int) -> None:
        """Take back the newest ``count`` entries."""
        for g in self.groups:
            g.crop(count)
        self.seen = max(0, self.seen - count)  # a layer that is left out has nothing to give back

    def nbytes(self) -> int:
        """Bytes of keys and values with scales, and of what is kept about them."""
        return sum(g.nbytes() for g in self.groups)

    def clone(self) -> KVLayer:
        """An independent copy."""
        twin = KVLayer(self.capacity)
        twin.groups, twin.seen, twin.query_tail = [g.clone() for g in self.groups], self.seen, self.query_tail
        twin.is_initialized, twin.notes = self.is_initialized, dict(self.notes)
        return twin


class StudioCache(Cache):
    """The cache of one batch: a list of :class:`KVLayer`, made for a known number of layers."""

    def __init__(self, layers: int, capacity: int = 0):
        super().__init__(layers=[KVLayer(capacity) for _ in range(layers)])

    layers: list[KVLayer]

    @property
    def seen(self) -> int:
        """Positions the model has seen; layers that are left out have seen none."""
        return max((layer.seen for layer in self.layers), default=0)

    def nbytes(self) -> int:
        """Bytes of all stored keys and values with scales."""
        return sum(layer.nbytes() for layer in self.layers)

    @property
    def kv_layers(self) -> list[KVLayer]:
        """The layers that keep keys and values."""
        return [layer for layer in self.layers if layer.keeps_kv]

    def stored(self) -> float:
        """Entries stored, mean over heads and over the layers that keep any."""
        return sum(layer.stored for layer in self.kv_layers) / max(1, len(self.kv_layers))

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
