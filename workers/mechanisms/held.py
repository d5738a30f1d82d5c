"""What a layer's cache holds, laid out as one rectangle, for those who read it: attention, scores, selections.

Heads of different lengths are filled up on the left with padding, so that the newest entries always stand last.

Shapes: B batch, H key-value heads, S entries of the longest head, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.mechanisms.kv_store import PADDING, gather_entries

if TYPE_CHECKING:
    from workers.mechanisms.cache import HeadGroup


@dataclass
class Held:
    """Keys and values with their positions.

    Attributes:
        keys, values: [B, H, S, D].
        positions: [B, 1 or H, S] logical positions; None = 0, 1, 2, ... with no padding.
        padded: some of the positions are padding.
        missing: per head, how many entries of its row are filling; empty = none in any head.
        tracked: tensors [B, H, S] that follow the entries.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None
    padded: bool = False
    missing: tuple[int, ...] = ()
    tracked: dict[str, Tensor] = field(default_factory=dict)

    @property
    def real(self) -> Tensor | None:
        """Which entries are no padding: bool [B, 1 or H, S]; None = all."""
        return None if self.positions is None or not self.padded else self.positions != PADDING

    def places(self) -> Tensor:
        """Logical positions [B or 1, 1 or H, S], made explicit."""
        if self.positions is None:
            return torch.arange(self.keys.shape[2], device=self.keys.device)[None, None]
        return self.positions

    def pick(self, index: Tensor) -> Held:
        """Only the entries ``index`` [B, H, n]; the cache keeps them all. Below 0 = no entry, its place becomes padding."""
        b, h = index.shape[:2]
        empty, index = index < 0, index.clamp_min(0)
        places = self.places().expand(b, h, -1).gather(2, index).masked_fill(empty, PADDING)
        padded = self.padded or bool(empty.any())
        return Held(gather_entries(self.keys, index), gather_entries(self.values, index), places, padded)


def rectangle(groups: Sequence[HeadGroup]) -> Held:
    """Everything that these head groups hold; a single group is read as it is, several are copied."""
    if len(groups) == 1:
        return groups[0].held()
    longest = max(g.store.length for g in groups)
    keys, values, places, missing = [], [], [], []
    tracked: dict[str, list[Tensor]] = {name: [] for name in groups[0].tracked}
    for g in groups:
        k, v = g.store.read()
        heads, gap = g.stop - g.start, longest - g.store.length
        keys.append(F.pad(k, (0, 0, gap, 0)))
        values.append(F.pad(v, (0, 0, gap, 0)))
        places.append(F.pad(g.logical(k.shape[0], k.device).expand(-1, heads, -1), (gap, 0), value=PADDING))
        missing += [gap] * heads
        for name, parts in tracked.items():
            parts.append(F.pad(g.tracked[name], (gap, 0)))
    return Held(
        *(torch.cat(parts, 1) for parts in (keys, values, places)),
        padded=any(missing) or any(g.padded for g in groups),
        missing=tuple(missing) if any(missing) else (),
        tracked={name: torch.cat(parts, 1) for name, parts in tracked.items()},
    )
