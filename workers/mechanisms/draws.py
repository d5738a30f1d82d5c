"""Random numbers that follow from a position alone, so that batch, padding and chunks never change a draw."""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of SplitMix64
STEPS = 1 << 53  # that a float64 tells apart in [0, 1)


def position_draws(positions: Tensor, seed: int, layer: int) -> Tensor:
    """Uniform in [0, 1): float64 [B, H, n] for positions [B, H, n], another for every seed, layer, head and position.

    SplitMix64 (Steele et al. 2014, Fast Splittable Pseudorandom Number Generators) of one after the other.
    """
    head = torch.arange(positions.shape[1], device=positions.device)[:, None]
    state = torch.zeros_like(positions)
    for key in (signed(seed), layer, head, positions):
        state = mixed(state + key)
    return (state & (STEPS - 1)).double() / STEPS


def mixed(x: Tensor) -> Tensor:
    """One step of SplitMix64 on int64, whose products and sums wrap around."""
    x = x + signed(GOLDEN)
    for shift, factor in ((30, FIRST), (27, SECOND)):
        x = (x ^ (x >> shift & ((1 << 64 - shift) - 1))) * signed(factor)
    return x ^ (x >> 31 & ((1 << 33) - 1))


def signed(x: int) -> int:
    """The int64 with the same bits."""
    return (x + 2**63) % 2**64 - 2**63
