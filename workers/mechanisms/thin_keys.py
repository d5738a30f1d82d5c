"""A cache store whose old keys keep only some of their channels; the newest keys and all values stay whole.

Every row and every KV head keeps channels of its own. What was pruned is read as zero, so that it adds nothing to a
product with a query.

Shapes: B batch, H key-value heads, S stored entries, P old ones, D head width, C channels kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.mechanisms.kv_store import gather_entries
from workers.mechanisms.two_part_store import Plain, TwoPartStore


@dataclass
class ThinKeys:
    """Old keys with fewer channels.

    Attributes:
        kept: [B, H, P, C]; channels: [B, H, C] int16, ascending, which ones these are.
        full: D.
    """

    kept: Tensor
    channels: Tensor
    full: int

    @classmethod
    def of(cls, keys: Tensor, channels: Tensor) -> ThinKeys:
        """Only the ``channels`` [B, H, C] of keys [B, H, P, D]."""
        index = channels.long().unsqueeze(2).expand(-1, -1, keys.shape[2], -1)
        return cls(keys.gather(3, index), channels.to(torch.int16), keys.shape[3])

    @property
    def width(self) -> int:
        return self.kept.shape[2]

    def read(self) -> Tensor:
        """Keys [B, H, P, D], zero in the pruned channels."""
        index = self.channels.long().unsqueeze(2).expand_as(self.kept)
        return self.kept.new_zeros(*self.kept.shape[:3], self.full).scatter_(3, index, self.kept)

    def take(self, index: Tensor) -> ThinKeys:
        return ThinKeys(gather_entries(self.kept, index), self.channels, self.full)

    def heads(self, start: int, stop: int) -> ThinKeys:
        return ThinKeys(self.kept[:, start:stop].clone(), self.channels[:, start:stop].clone(), self.full)

    def tensors(self) -> list[Tensor]:
        return [self.kept, self.channels]


def thin_store(keys: Tensor, values: Tensor, channels: Tensor, window: int) -> TwoPartStore[ThinKeys, Plain]:
    """Prune the keys of all entries but the newest.

    Args:
        keys, values: [B, H, S, D].
        channels: [B, H, C], those that stay.
        window: newest entries whose keys stay whole.
    """
    old = max(0, keys.shape[2] - window)
    parts = (ThinKeys.of(keys[:, :, :old], channels), Plain(values[:, :, :old].clone())) if old else None
    return TwoPartStore(keys[:, :, old:], values[:, :, old:], parts)
