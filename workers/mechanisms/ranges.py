"""Where an evenly spaced grid begins and ends: around zero or around its range, over all of the range or a part of it.

Gholami et al., A survey of quantization methods, arXiv:2103.13630, section III: symmetric and asymmetric grids, calibration of the
clipping range.

Shapes: R rows, K inputs, g inputs of a group, G = K/g groups of a row, b bits.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from workers.mechanisms import packing

Symmetry = Literal["asymmetric", "full", "restricted"]
SHRINKS = tuple(1 - i / 20 for i in range(13))  # shares of the range that are tried
TAIL = 0.001  # of the weights, cut off on each side


def spanning(weight: Tensor, group: int, bits: int, symmetry: Symmetry, shrink: float | Tensor = 1.0) -> Tensor:
    """The grid bfloat16 [G, R, 2] over a share of the range of each group of [R, K].

    ``full`` uses all 2^b codes around zero, ``S = 2 max|w| / (2^b - 1)``; ``restricted`` has one point fewer and is symmetric to the
    last code, ``S = max|w| / (2^(b-1) - 1)``.
    """
    if symmetry == "asymmetric":
        return packing.fit_groups(weight, group, bits, shrink)
    largest = weight.float().unflatten(1, (-1, group)).abs().amax(2) * shrink
    step = 2 * largest / (2**bits - 1) if symmetry == "full" else largest / (2 ** (bits - 1) - 1)
    return packing.as_grid(step, torch.full_like(step, torch.nan))


def coded(weight: Tensor, grid: Tensor, bits: int, symmetry: Symmetry) -> Tensor:
    """The nearest codes uint8 [R, K]; a restricted grid leaves the lowest one out."""
    codes = packing.encode(weight, grid, bits)
    return codes.clamp(min=1) if symmetry == "restricted" else codes


def least_error(weight: Tensor, group: int, bits: int, symmetry: Symmetry) -> Tensor:
    """The grid [G, R, 2] over that share of the range, of those tried, whose squared error is least in each group."""
    best, least = spanning(weight, group, bits, symmetry), None
    for shrink in SHRINKS:
        grid = spanning(weight, group, bits, symmetry, shrink)
        near = packing.dequantise(coded(weight, grid, bits, symmetry).T, grid, bits).T
        error = (near - weight).square().unflatten(1, (-1, group)).sum(2).T  # [G, R]
        if least is None:
            best, least = grid, error
            continue
        best, least = torch.where((error < least)[..., None], grid, best), torch.minimum(error, least)
    return best


def without_tails(weight: Tensor, group: int) -> Tensor:
    """[R, K] with the 0.1 % smallest and largest weights of each group set to the nearest that stays; none below 1,000 weights."""
    grouped = weight.unflatten(1, (-1, group))
    cut = int(TAIL * group)
    if cut == 0:
        return weight
    low, high = (grouped.kthvalue(k, 2, keepdim=True).values for k in (cut + 1, group - cut))
    return grouped.clamp(low, high).flatten(1)
