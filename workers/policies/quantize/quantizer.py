"""The switches of the quantization survey."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from studio_state.catalog import Card
from studio_state.errors import SpecError
from workers.mechanisms import levels, packing, ranges
from workers.mechanisms.linear import Convolved, Replacement, bias_of, matrix_of
from workers.mechanisms.packed_linear import stored
from workers.mechanisms.rounding import GroupedPolicy
from workers.mechanisms.weight_policy import QUANTIZES, Spot
from workers.methods import card, knob


class Quantizer(GroupedPolicy):
    """One quantizer with the survey's switches: what shares a grid, where it is centred, where it is clipped, how its points lie.

    Gholami et al., A survey of quantization methods, arXiv:2103.13630, section III: granularity (matrix, channel, group), symmetric
    (full or restricted range) or asymmetric grids, calibration of the clipping range, and non-uniform grids (k-means, powers of
    two). ``per=group,clip=range`` is the policy ``rtn``; the other settings show what each of its choices is worth.

    Deviations. Weights only (activations: ``dynamic-int8``; mixed precision: ``mixed-bits``), after training; training with rounding
    and integer-only products are not in it, nor the choice of a range by entropy. An asymmetric grid is centred on its range by a
    float, not by a whole zero point; groups that hold exact zeros get a symmetric one. Grids and tables are stored once a row even
    where the whole matrix shares them, so that maps can be fused. Products are those of floats with unpacked weights, but for 8
    symmetric bits a row and 4 bits by group, which have a kernel.
    """

    card: ClassVar[Card] = card(
        id="quantizer",
        title="Quantizer",
        paper="arXiv:2103.13630",
        not_neutral_because="every setting rounds; each weight inside the clipping range moves by at most half a step",
        **QUANTIZES,
    )
    convolutions: ClassVar[bool] = True

    bits: int = knob(4, ge=2, le=8, help="bits a weight; fewer = smaller, less exact")
    per: Literal["matrix", "row", "group"] = knob(
        "row", help="weights that share a grid; fewer weights = more exact, more scales"
    )
    group_size: Literal[32, 64, 128, 256] = knob(
        32, help="inputs of a group; larger = smaller, less exact", fits="divides-widths", when={"per": ["group"]}
    )
    points: Literal["uniform", "kmeans", "powers"] = knob(
        "uniform", help="evenly spaced, found by clustering, or powers of two; all but the first store a table a grid"
    )
    symmetry: Literal["asymmetric", "full", "restricted"] = knob(
        "asymmetric",
        help="grid from the smallest to the largest weight, or around zero with all codes or one fewer",
        when={"points": ["uniform"]},
    )
    clip: Literal["range", "mse", "percentile"] = knob(
        "mse",
        help="grid over the whole range, over the share of it with the least squared error, or without 0.1 % on each side",
        when={"points": ["uniform"]},
    )

    def replacement(self, source: nn.Module, spot: Spot) -> Replacement | None:
        """The packed form of one linear map; a convolution of a width that does not divide stays as it is.

        Raises:
            SpecError: the group, or the 8 weights of a byte, do not divide the width of a linear map.
        """
        if spot.head and self.head != "same":
            return super().replacement(source, spot)
        weight = matrix_of(source).detach().float()
        rows, width = weight.shape
        unit = self.group_size if self.per == "group" else 8  # weights of a byte
        if width % unit and isinstance(source, nn.Conv2d | Convolved):
            return None
        if width % unit:
            raise SpecError(
                f"{self.card.id}: {unit} does not divide the width {width} of {spot.name}; choose a group_size that does, per=row or "
                "per=matrix for widths divisible by 8, or leave it out with the knob modules"
            )
        view = weight.reshape(1, -1) if self.per == "matrix" else weight
        group = self.group_size if self.per == "group" else view.shape[1]
        if self.points == "uniform":
            fit = ranges.least_error if self.clip == "mse" else ranges.spanning
            inside = ranges.without_tails(view, group) if self.clip == "percentile" else view
            grid = fit(inside, group, self.bits, self.symmetry)
            codes = ranges.coded(view, grid, self.bits, self.symmetry)
        else:
            values = view.unflatten(1, (-1, group)).flatten(0, 1)
            table = (levels.clustered if self.points == "kmeans" else levels.powers_of_two)(values, 2**self.bits).bfloat16()
            codes = levels.nearest(values, table.float())
            grid = table.unflatten(0, (len(view), -1)).transpose(0, 1)
        codes, grid = codes.view(rows, width), grid.expand(-1, rows, -1).contiguous()
        if self.points == "uniform":
            return stored(codes, grid, self.bits, bias_of(source))
        return levels.CodebookLinear(packing.pack_planes(codes, self.bits), grid, bias_of(source))

    def weight_factor(self, bits: int) -> float:
        """Codes and grids by group, over the bits of the baseline; grids a row are small beside it."""
        grid = 32 if self.points == "uniform" else 16 * 2**self.bits
        return (self.bits + (grid / self.group_size if self.per == "group" else 0)) / bits
