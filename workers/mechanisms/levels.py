"""Grids whose points need not be evenly spaced: the nearest of some levels, levels found by clustering, powers of two.

Shapes: R groups of weights, g weights in one, L levels; N output rows, K inputs, G groups of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.mechanisms import packing
from workers.mechanisms.packed_linear import BitPlaneLinear

ROUNDS = 25  # of clustering; it ends earlier where nothing moves


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Which level [R, L] (in any order) each value [R, g] is nearest to: uint8 [R, g]; of two at the same distance the smaller."""
    ascending, order = levels.sort(1)
    between = (ascending[:, 1:] + ascending[:, :-1]) / 2
    place = torch.searchsorted(between.contiguous(), values.contiguous())
    return order.gather(1, place).to(torch.uint8)


class Line(NamedTuple):
    """Groups of values in ascending order. In one dimension the values nearest to a level are a run of them, so counts and sums by
    level take a search for each level and no distances.

    Attributes:
        values: float64 [R, g] ascending; sums: [R, g + 1] running ones; squares: [R, 1] sum of squares.
    """

    values: Tensor
    sums: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Line:
        """Of values [R, g]."""
        ascending = values.double().sort(1).values
        return cls(ascending, F.pad(ascending.cumsum(1), (1, 0)), ascending.square().sum(1, keepdim=True))

    def cells(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """How many values are nearest to each of the ascending levels [R, L], and their sum: [R, L] each."""
        cuts = torch.searchsorted(self.values, ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous())
        edges = F.pad(cuts, (1, 0))
        edges = F.pad(edges, (0, 1), value=self.values.shape[1])
        return edges.diff(dim=1), self.sums.gather(1, edges).diff(dim=1)

    def error(self, levels: Tensor, size: Tensor, total: Tensor) -> Tensor:
        """Summed squared distance from the levels, given what :meth:`cells` says of them: [R, 1]."""
        return self.squares + (levels * (levels * size - 2 * total)).sum(1, keepdim=True)


def clustered(values: Tensor, count: int) -> Tensor:
    """Levels [R, L] that k-means finds for values [R, g]: Lloyd's rounds from even spacing and from quantiles, the better of the two."""
    line, n = Line.of(values), values.shape[1]
    share = (torch.arange(count, device=values.device) + 0.5) / count
    low, high = line.values[:, :1], line.values[:, -1:]
    even, quantiles = (_settled(line, start) for start in (low + (high - low) * share, line.values[:, (share * n).long()]))
    better = line.error(even, *line.cells(even)) <= line.error(quantiles, *line.cells(quantiles))
    return torch.where(better, even, quantiles).float()


def _settled(line: Line, levels: Tensor) -> Tensor:
    """Levels after rounds of taking the mean of what is nearest."""
    for _ in range(ROUNDS):
        size, total = line.cells(levels)
        moved = torch.where(size > 0, total / size.clamp(min=1), levels)  # an empty cluster stays where it is
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels


def powers_of_two(values: Tensor, count: int) -> Tensor:
    """Levels [R, L] for values [R, g]: 0 and both signs of falling powers of two, from the one nearest to the largest value.

    Of an even number of levels one has no partner: the smallest power is there with a minus only.
    """
    largest = values.abs().amax(1, keepdim=True).float()
    top = torch.where(largest > 0, largest, torch.ones_like(largest)).log2().round().exp2()
    falling = top * 0.5 ** torch.arange(count // 2, device=values.device)
    return torch.cat([torch.zeros_like(top), falling[:, : count // 2 - 1], -falling], 1)


class CodebookLinear(BitPlaneLinear):
    """Any number of bits by group, each code the number of a level in the group's own table: unpacked at every call.

    Args:
        planes: uint8 [b, N, K/8] (:func:`workers.mechanisms.packing.pack_planes`); grid: the tables, bfloat16 [G, N, 2^b]; bias: [N].
    """

    def _values(self, planes: Tensor, grid: Tensor) -> Tensor:
        codes = packing.unpack_planes(planes).unflatten(1, (grid.shape[0], -1))  # [n, G, g]
        return grid.float().transpose(0, 1).gather(2, codes.long()).flatten(1)
