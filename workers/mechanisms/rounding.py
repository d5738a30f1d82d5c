"""The base of policies that store weights as codes on a grid by group: the format and its knobs, the same for every way of rounding.

Shapes: N output rows, K inputs, g group, b bits.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from studio_state.errors import SpecError
from workers.cards import knob
from workers.mechanisms import packing
from workers.mechanisms.linear import Convolved, Replacement, bias_of, matrix_of
from workers.mechanisms.packed_linear import Int8Linear, stored
from workers.mechanisms.weight_policy import Spot, WeightPolicy

ROW_BITS = 8  # with so many bits there is one symmetric scale a row, without a zero point


class GroupedPolicy(WeightPolicy):
    """How many bits, what shares a scale, and what becomes of the output head."""

    bits: int = knob(8, ge=2, le=8, help="bits a weight; fewer = smaller, less exact; 4 and 8 have fast CPU kernels, others none")
    group_size: Literal[32, 64, 128, 256] = knob(
        32,
        help="below 8 bits: inputs that share a scale; larger = smaller, less exact",
        fits="divides-widths",
        when={"bits": list(range(2, ROW_BITS))},
    )
    head: Literal["int8", "same", "keep"] = knob(
        "int8", help="output head and the embedding tied to it: 8 bits a row, the same format as the layers, or as they are"
    )

    def codes(self, weight: Tensor, grid: Tensor, bits: int, spot: Spot) -> tuple[Tensor, Tensor]:
        """Codes uint8 [N, K] for a matrix [N, K], and the grid [K/g, N, 2] they are on. The default rounds to the nearest.

        Args:
            grid: the one that spans the weights; a method may choose another of its shape.
        """
        return packing.encode(weight, grid, bits), grid

    def format_of(self, spot: Spot) -> tuple[int, int]:
        """Bits and group of one map."""
        return self.bits, self.group_size

    def replacement(self, source: nn.Module, spot: Spot) -> Replacement | None:
        """The packed form of one linear map; a convolution that the group does not divide stays as it is.

        Raises:
            SpecError: the group does not divide the width of a linear map.
        """
        if spot.head and self.head == "keep":
            return None
        if spot.head and self.head == "int8":
            return Int8Linear.of(source)
        bits, group = self.format_of(spot)
        weight = matrix_of(source).detach()
        width = weight.shape[1]
        if bits < ROW_BITS and width % group:
            if isinstance(source, nn.Conv2d | Convolved):
                return None
            self.check_width(width, bits, group, spot.name)
        pieces = []
        for rows in weight.split(packing.ROW_CHUNK):
            pieces.append(self.codes(rows, plain_grid(rows, bits, group), bits, spot))
        return self.packed(torch.cat([c for c, _ in pieces]), torch.cat([g for _, g in pieces], 1), bits, bias_of(source), spot)

    def check_width(self, width: int, bits: int, group: int, name: str) -> None:
        """Below 8 bits a group must divide the inputs of a map.

        Raises:
            SpecError: it does not.
        """
        if bits < ROW_BITS and width % group:
            raise SpecError(
                f"{self.card.id}: group_size = {group} does not divide the width {width} of {name}; "
                f"choose one that does; only {ROW_BITS} bits, with a scale a row, take any width"
            )

    def packed(self, codes: Tensor, grid: Tensor, bits: int, bias: Tensor | None, spot: Spot) -> Replacement:
        """What holds the codes; methods that change the map's input wrap it."""
        return stored(codes, grid, bits, bias)

    def weight_factor(self, bits: int) -> float:
        """Bits stored, scales and zero points included, over those of the baseline."""
        return stored_bits(self.bits, self.group_size) / bits


def plain_grid(weight: Tensor, bits: int, group: int) -> Tensor:
    """The grid [K/g, N, 2] that spans the weights [N, K]: one symmetric scale a row with 8 bits, else by group."""
    return packing.fit_rows(weight) if bits == ROW_BITS else packing.fit_groups(weight, group, bits)


def stored_bits(bits: float, group: int) -> float:
    """Bits a weight with its share of scale and zero point (two bfloat16 numbers a group)."""
    return float(bits if bits == ROW_BITS else bits + 32 / group)
