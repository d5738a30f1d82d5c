"""8-bit floats."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from studio_state.catalog import Card
from studio_state.resources import Use
from workers.mechanisms.float8 import E4M3, E5M2, Float8Linear, to_float8
from workers.mechanisms.linear import Replacement, bias_of, matrix_of
from workers.mechanisms.weight_policy import QUANTIZES, Spot, WeightPolicy
from workers.methods import card, knob


class FP8(WeightPolicy):
    """Store linear weights as 8-bit floats with a scale a row.

    Micikevicius et al. 2022, arXiv:2209.05433, section 3: e4m3 has 4 bits of exponent and 3 of mantissa (largest value 448),
    e5m2 has 5 and 2 (57344). The grid is finer near zero and coarser far out than that of 8-bit integers: a weight moves by
    at most 1/16 (e4m3) or 1/8 (e5m2) of itself, until it is too small for the format, where integers move all weights of a row by
    up to the same step.

    Deviations: a scale a row instead of one a tensor, found from the weights. Weights alone are rounded unless
    ``activations=fp8``, which rounds what goes into a map to e4m3, with a scale a token. 8-bit floats are unpacked at every call,
    which is slower than not to quantize at all; only with ``activations=fp8`` on a GPU of compute capability 9 or more, e4m3, and
    widths that 16 divides, they are multiplied as they are, and the product comes back in bfloat16. An embedding tied to the
    output head is read from the head's table. Convolutions keep 8-bit weights too, and float activations.
    """

    card: ClassVar[Card] = card(
        id="fp8",
        title="8-bit floats",
        paper="arXiv:2209.05433",
        not_neutral_because="every setting rounds the weights to 2 or 3 bits of mantissa",
        uses=(Use(resource="activations.format", mode="owns", when={"activations": ["fp8"]}),),
        **QUANTIZES,
    )
    convolutions: ClassVar[bool] = True

    format: Literal["e4m3", "e5m2"] = knob("e4m3", help="bits of exponent and mantissa: e4m3 is finer, e5m2 reaches further")
    activations: Literal["float", "fp8"] = knob("float", help="round what goes into a map to 8-bit floats too, or leave it")
    head: bool = knob(True, help="quantize the output head and the embedding tied to it too; off = larger, its scores stay exact")

    def replacement(self, source: nn.Module, spot: Spot) -> Replacement | None:
        """The 8-bit form of one linear map."""
        if spot.head and not self.head:
            return None
        form = {"e4m3": E4M3, "e5m2": E5M2}[self.format]
        return Float8Linear(*to_float8(matrix_of(source).detach(), form), bias_of(source), self.activations == "fp8")

    def weight_factor(self, bits: int) -> float:
        """8 bits a weight over those of the baseline."""
        return 8 / bits
