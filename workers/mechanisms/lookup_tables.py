"""Tables of signed sums of a few activations, the look-up in place of multiplying. Pure functions.

A run of k inputs has 2^k sums ``+-x_0 +- ... +-x_(k-1)``; bit j of a pattern is set where x_j counts with a plus. A plane of a weight's
bits then picks one sum a run instead of multiplying k times. Negating all signs negates the sum, so half a table is enough.

Shapes: m input rows, K inputs, k inputs of a run, g inputs of a group, N output rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8 = 127


def tables(x: Tensor, k: int) -> Tensor:
    """All signed sums of every run of k inputs: [m, K] -> [m, K/k, 2^k]. Each input doubles the table: + and - of what is there."""
    runs = x.unflatten(-1, (-1, k))
    out = torch.zeros_like(runs[..., :1])
    for j in range(k):
        out = torch.cat([out - runs[..., j, None], out + runs[..., j, None]], -1)
    return out


def half_tables(x: Tensor) -> Tensor:
    """Signed sums of every run of 4 inputs in which the last one counts with a minus: [m, K] -> [m, K/4, 8].

    The other 8 are their negatives: ``table[p] == -table[15 - p]``.
    """
    return tables(x, 4)[..., :8]


def folded(planes: Tensor) -> Tensor:
    """Bit planes (two runs of 4 a byte) as sign and place in the half table: uint8 of the same shape; undone by itself.

    A pattern whose last bit is set stands for the negative of its complement, so its other three bits are turned over once, offline.
    """
    return planes ^ (((planes >> 3) & 1) * 7) ^ (((planes >> 7) & 1) * 0x70)


def picks(folded_plane: Tensor) -> tuple[Tensor, Tensor]:
    """Place in the half table and whether it is negated, of a folded plane uint8 [N, K/8]: int64 and bool [K/4, N]."""
    halves = torch.stack([folded_plane & 15, folded_plane >> 4], -1).flatten(1).T
    return (halves & 7).long(), halves > 7


def rounded(half: Tensor, runs: int) -> tuple[Tensor, Tensor]:
    """Half tables [m, K/4, 8] in 8 bits: int8 of the same shape, and one scale for every ``runs`` of them, [m, K/(4 runs)]."""
    grouped = half.unflatten(1, (-1, runs))
    scale = grouped.abs().amax((2, 3)) / INT8
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (grouped / safe[..., None, None]).round().to(torch.int8).flatten(1, 2), safe
