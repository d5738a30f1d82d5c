"""LUT Tensor Core."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms import lookup_tables, packing
from workers.mechanisms.linear import Replacement
from workers.mechanisms.lut_linear import HalfTableLinear
from workers.mechanisms.rounding import GroupedPolicy
from workers.mechanisms.weight_policy import QUANTIZES, Spot
from workers.methods import card, knob


class LutTensorCore(GroupedPolicy):
    """Multiply few-bit weights bit by bit with look-ups in half tables of four activations, rounded to 8 bits; the unit is simulated.

    LUT Tensor Core, arXiv:2408.06003 (ISCA 2025), as far as summaries of it tell. Real here: uniform codes are read as bits of -1
    and 1 (half the step, the offset moved), the sums of every four inputs are made once and only half of them, since the others are
    their negatives, the complement is folded into the stored planes, and planes are looked up one after the other. Tables are
    rounded to 8 bits, with one scale a token and group of inputs. With ``tables=float`` the result is that of round-to-nearest.

    Simulated: area and energy of the paper's unit against FP16 multiply-adds, from published figures of its parts; no such unit is
    here, and gathers of PyTorch are slower than a product of floats. The tile instruction and its compiler are left out, and so
    is fusing the tables into the operator before. Weights are rounded here (with 1 bit: a sign around the group's mean, as
    BitNet does); the paper takes models that were trained for few bits. Convolutions keep packed weights, unpacked at every call.
    """

    card: ClassVar[Card] = card(
        id="lut-tensor-core",
        title="LUT Tensor Core",
        paper="arXiv:2408.06003",
        not_neutral_because="every setting rounds weights; with float tables the product equals that with the rounded weights",
        **QUANTIZES,
    )
    convolutions: ClassVar[bool] = True

    bits: int = knob(2, ge=1, le=4, help="bits a weight; fewer = smaller, less exact, fewer look-ups")
    group_size: Literal[8, 16, 32, 64, 128, 256] = knob(
        32, help="inputs that share a step, and a scale of their tables; larger = smaller, less exact", fits="divides-widths"
    )
    tables: Literal["int8", "float"] = knob("int8", help="sums of activations in 8 bits, or as they are")

    def codes(self, weight: Tensor, grid: Tensor, bits: int, spot: Spot) -> tuple[Tensor, Tensor]:
        """The nearest codes; one bit stands for the group's mean plus or minus the mean distance from it."""
        if bits == 1:
            grouped = weight.float().unflatten(1, (-1, self.group_size))
            middle = grouped.mean(2)
            grid = packing.as_grid(2 * (grouped - middle[..., None]).abs().mean(2), middle)
        return packing.encode(weight, grid, bits), grid

    def packed(self, codes: Tensor, grid: Tensor, bits: int, bias: Tensor | None, spot: Spot) -> Replacement:
        """Folded bit planes."""
        planes = lookup_tables.folded(packing.pack_planes(codes, bits))
        return HalfTableLinear(planes, grid, bias, self.tables == "int8")
