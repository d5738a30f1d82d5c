"""HQQ."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms import packing
from workers.mechanisms.rounding import ROW_BITS, GroupedPolicy
from workers.mechanisms.weight_policy import QUANTIZES, Spot
from workers.methods import card, knob

BETA, KAPPA = 10.0, 1.01  # weight of the splitting, and what it grows by at every step; the released code's


class HQQ(GroupedPolicy):
    """Move each group's zero point to where a few badly rounded weights are let go and the others fit better; no calibration.

    Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", and its released code: the p-th
    power of the rounding error, p < 1, is lowered by half-quadratic splitting. In turn the error is shrunk by the proximal
    operator of the p-norm, which leaves only large errors, and the zero point is set to the mean of what remains.

    Deviations: errors are measured in steps of the grid, so that one weight of the splitting suits every matrix (the released
    code takes them in the weights' own unit, in which at its weight of 10 errors under about 0.17 all count as small). Of all
    steps a group keeps the best, with zero points as they are stored (bfloat16); the released code stops the whole matrix when
    its mean error no longer falls. Groups that hold exact zeros, as pruning leaves them, keep their zero point at zero. With
    8 bits, whose format has no zero point, it is ``rtn``. Memory and speed are those of ``rtn``; convolutions take part.
    """

    card: ClassVar[Card] = card(
        id="hqq",
        title="HQQ",
        paper="Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023",
        hopes={"decode_tokens_per_s": "up"},
        not_neutral_because="every setting rounds; without iterations it is round-to-nearest",
        **QUANTIZES,
    )
    convolutions: ClassVar[bool] = True

    bits: int = knob(4, ge=2, le=8, help="bits a weight; fewer = smaller, less exact; 4 and 8 have fast CPU kernels, others none")
    lp_norm: float = knob(
        0.7, ge=0.1, le=1.0, help="p of the error that is lowered; smaller = large errors count less beside many small ones"
    )
    iterations: int = knob(20, ge=0, le=100, help="steps of the splitting; 0 = round-to-nearest")

    def codes(self, weight: Tensor, grid: Tensor, bits: int, spot: Spot) -> tuple[Tensor, Tensor]:
        """Codes uint8 [N, K] on the grid [K/g, N, 2] with its zero points moved."""
        if bits == ROW_BITS:
            return super().codes(weight, grid, bits, spot)
        grid = move_zeros(weight, grid, bits, self.lp_norm, self.iterations)
        return packing.encode(weight, grid, bits), grid


def move_zeros(weight: Tensor, grid: Tensor, bits: int, p: float, iterations: int) -> Tensor:
    """The grid [K/g, N, 2] with the zero points, among those that the splitting comes by, of the least sum of |error|^p."""
    half = 2 ** (bits - 1)
    grouped = weight.float().unflatten(1, (grid.shape[0], -1))  # [N, K/g, g]
    scale, best = grid.float().transpose(0, 1)[..., None].unbind(2)  # [N, K/g, 1] each
    least = torch.full_like(best, torch.inf)
    fixed = (grouped == 0).any(2, keepdim=True)
    zero, beta = best, BETA
    for step in range(iterations + 1):
        levels = ((grouped - zero) / scale).round_().clamp_(-half, half - 1)
        error = (grouped - zero) / scale - levels  # in steps of the grid
        total = error.abs().pow(p).sum(2, keepdim=True)
        better = total < least
        best, least = torch.where(better, zero, best), torch.where(better, total, least)
        if step < iterations:
            kept = error - error.sign() * (error.abs() - error.abs().pow(p - 1) / beta).relu_()
            moved = zero + kept.mean(2, keepdim=True) * scale
            zero = torch.where(fixed, zero, moved.bfloat16().float())
            beta *= KAPPA
    return torch.cat([scale, best], 2).bfloat16().transpose(0, 1).contiguous()
