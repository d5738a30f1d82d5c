"""Two layers that share the directions of their cached entries and keep each its own lengths.

Of a pair of layers every entry is one unit vector, and a length in each of the two; entries that point apart too far
stay in both as they are. New entries stay as they come.

Shapes: B batch, H KV heads, P entries of the pair, M merged ones, R that stay apart, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.mechanisms.held import Held
from workers.mechanisms.kv_store import gather_entries
from workers.mechanisms.two_part_store import TwoPartStore

_PARALLEL = 1e-4  # sine below which two directions are one, or opposite, and the arc between them is a straight line


@dataclass(frozen=True)
class Order:
    """How entries stand in memory: the merged ones, then those apart; heads with fewer of either are filled up.

    Attributes:
        merged: [B, H, M] and apart: [B, H, R], which entries these are.
        places: [B, H, P], where among both each entry stands.
    """

    merged: Tensor
    apart: Tensor
    places: Tensor

    @classmethod
    def of(cls, apart: Tensor) -> Order:
        """From which entries stay apart [B, H, P]."""
        merged, rest = (
            x.int().argsort(dim=2, descending=True, stable=True)[:, :, : int(x.sum(2).max())] for x in (~apart, apart)
        )
        places = torch.where(apart, merged.shape[2] + apart.cumsum(2) - 1, (~apart).cumsum(2) - 1)
        return cls(merged, rest, places)


@dataclass
class Shared:
    """What both layers read: directions [B, H, M, D], and every entry's place [B, H, P] int32 (see :class:`Order`)."""

    directions: Tensor
    places: Tensor
    left: tuple[Tensor, Order, Shared] | None = field(default=None, repr=False)

    def take(self, index: Tensor) -> tuple[Order, Shared, bool]:
        """Only the entries ``index`` [B, H, n]; the second layer that asks for the same ones gets what the first got.

        Returns:
            Where they stood, among the merged entries and among those apart; what is shared now; whether it is new.
        """
        if self.left is not None and torch.equal(self.left[0], index):
            return self.left[1], self.left[2], False
        places, merged = self.places.long().gather(2, index), self.directions.shape[2]
        order = Order.of(places >= merged)
        stood = Order(
            places.gather(2, order.merged).clamp(max=max(0, merged - 1)),
            (places.gather(2, order.apart) - merged).clamp_min(0),
            order.places,
        )
        shared = Shared(gather_entries(self.directions, stood.merged), order.places.to(torch.int32))
        self.left = (index, stood, shared)
        return stood, shared, True


@dataclass
class MergedPart:
    """Keys, or values, of one layer of a pair.

    Attributes:
        shared: what the other layer reads too.
        lengths: [B, H, M] of the merged entries; apart: [B, H, R, D], the others.
        counts_shared: this layer counts the bytes of what both share; the other one does not.
    """

    shared: Shared
    lengths: Tensor
    apart: Tensor
    counts_shared: bool

    @property
    def width(self) -> int:
        return self.shared.places.shape[2]

    def read(self) -> Tensor:
        merged = self.shared.directions * self.lengths.unsqueeze(-1)
        return gather_entries(torch.cat((merged, self.apart), 2), self.shared.places.long())

    def take(self, index: Tensor) -> MergedPart:
        stood, shared, new = self.shared.take(index)
        return MergedPart(
            shared, self.lengths.gather(2, stood.merged), gather_entries(self.apart, stood.apart), self.counts_shared or new
        )

    def heads(self, start: int, stop: int) -> MergedPart:
        """Only these heads; what they share no more is counted here."""
        directions, places, lengths, apart = (
            x[:, start:stop].clone() for x in (self.shared.directions, self.shared.places, self.lengths, self.apart)
        )
        return MergedPart(Shared(directions, places), lengths, apart, counts_shared=True)

    def tensors(self) -> list[Tensor]:
        own = [self.lengths, self.apart]
        return [*own, self.shared.directions, self.shared.places] if self.counts_shared else own


def merge(first: Tensor, second: Tensor, share: float, retention: float, real: Tensor | None) -> tuple[MergedPart, MergedPart]:
    """Merge the keys, or the values, of two layers.

    Args:
        first, second: [B, H, P, D], of the lower and the upper layer.
        share: of the way from the lower layer's direction to the upper one's at which the common one lies.
        retention: entries whose angle is in this uppermost share of the range of all angles of their row and head
            stay apart.
        real: broadcastable to [B, H, P], False for padding; None = all are real.
    """
    a, b = (F.normalize(x.float(), dim=-1) for x in (first, second))
    angle = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))  # [B, H, P]; exact near 0, where acos is not
    counted = torch.ones_like(angle, dtype=torch.bool) if real is None else real.expand_as(angle)
    least, most = angle.masked_fill(~counted, torch.inf).amin(2), angle.masked_fill(~counted, -torch.inf).amax(2)
    order = Order.of(counted & (angle > (most - retention * (most - least)).unsqueeze(-1)))
    way = direction(a, b, angle, share).to(first.dtype)
    shared = Shared(gather_entries(way, order.merged), order.places.to(torch.int32))
    lower, upper = (
        MergedPart(
            shared,
            x.float().norm(dim=-1).to(x.dtype).gather(2, order.merged),
            gather_entries(x, order.apart),
            counts_shared=x is first,
        )
        for x in (first, second)
    )
    return lower, upper


def direction(a: Tensor, b: Tensor, angle: Tensor, share: float) -> Tensor:
    """The unit vector at ``share`` of the arc from a to b (SLERP): [..., D] from unit vectors and their angles [...]."""
    sine = angle.sin()
    straight = sine < _PARALLEL
    sine = sine.masked_fill(straight, 1.0)
    from_a = torch.where(straight, 1 - share, ((1 - share) * angle).sin() / sine)
    from_b = torch.where(straight, share, (share * angle).sin() / sine)
    return F.normalize(from_a.unsqueeze(-1) * a + from_b.unsqueeze(-1) * b, dim=-1)


def merged_stores(
    lower: Held, upper: Held, share: float, retention: float
) -> tuple[TwoPartStore[MergedPart, MergedPart], TwoPartStore[MergedPart, MergedPart]]:
    """The stores of two layers that hold as many entries, all of them merged; arguments as in :func:`merge`."""
    keys = merge(lower.keys, upper.keys, share, retention, lower.real)
    values = merge(lower.values, upper.values, share, retention, lower.real)
    nothing = (lower.keys[:, :, :0], lower.values[:, :, :0])
    return TwoPartStore(*nothing, (keys[0], values[0])), TwoPartStore(*nothing, (keys[1], values[1]))
