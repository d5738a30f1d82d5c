"""LUT-GEMM."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms import binary_codes, packing
from workers.mechanisms.linear import Replacement
from workers.mechanisms.lut_linear import BinaryCodeLinear
from workers.mechanisms.rounding import GroupedPolicy
from workers.mechanisms.weight_policy import QUANTIZES, Spot
from workers.methods import card, knob


class LutGemm(GroupedPolicy):
    """Store weights as sums of a few scaled sign patterns, and multiply by looking up sums of eight activations.

    LUT-GEMM, arXiv:2206.09557: binary coding by group, ``w ~ sum_b alpha_b beta_b + z``, fitted greedily and then by alternating
    between nearest codes and least squares (15 rounds, as in the authors' code), or taken over exactly from a uniform grid; 256
    signed sums of every eight inputs, one look-up a byte of a bit plane. Nothing is turned back into floats where it looks up.

    Deviations. Alphas are bfloat16 (the paper: float16). The look-ups are PyTorch's gathers for up to eight input rows (decoding);
    longer prompts are multiplied with unpacked weights. That needs fewer operations, as counted, but is slower than a product of
    floats: there is no fused kernel of the kind that the paper's speed is from. Binary coding without a uniform grid has no code for
    zero, so pruned weights come back unless ``fit=uniform``. The best fit by alternating is local: with 4 bits plain rounding can
    be closer to the weights.
    """

    card: ClassVar[Card] = card(
        id="lut-gemm",
        title="LUT-GEMM",
        paper="arXiv:2206.09557",
        not_neutral_because="every setting rounds; a product by look-up equals that with the unpacked weights",
        **QUANTIZES,
    )
    convolutions: ClassVar[bool] = True

    bits: int = knob(3, ge=1, le=4, help="sign patterns a weight; fewer = smaller, less exact, fewer look-ups")
    group_size: Literal[8, 16, 32, 64, 128, 256] = knob(
        32, help="inputs that share their scales; larger = smaller, less exact", fits="divides-widths"
    )
    fit: Literal["alternating", "greedy", "uniform"] = knob(
        "alternating", help="how patterns and scales are found: best by turns, one after the other, or those of round-to-nearest"
    )
    offset: bool = knob(
        False,
        help="an offset a group beside the scales, for weights that are not centred; uniform always has one",
        when={"fit": ["alternating", "greedy"]},
    )
    kernel: Literal["lut", "unpack"] = knob("lut", help="multiply by look-up in tables, or unpack the weights at every call")

    def codes(self, weight: Tensor, grid: Tensor, bits: int, spot: Spot) -> tuple[Tensor, Tensor]:
        """Codes uint8 [N, K], and the scales they stand for, [K/g, N, b or b + 1]."""
        if self.fit == "uniform":
            return packing.encode(weight, grid, bits), binary_codes.of_grid(grid, bits)
        rounds = binary_codes.ROUNDS if self.fit == "alternating" else 0
        return binary_codes.fit(weight, self.group_size, bits, rounds, self.offset)

    def packed(self, codes: Tensor, grid: Tensor, bits: int, bias: Tensor | None, spot: Spot) -> Replacement:
        """Bit planes with their scales."""
        return BinaryCodeLinear(packing.pack_planes(codes, bits), grid, bias, self.kernel == "lut")

    def weight_factor(self, bits: int) -> float:
        """Patterns and scales stored, over the bits of the baseline."""
        scales = self.bits + (self.offset or self.fit == "uniform")
        return (self.bits + 16 * scales / self.group_size) / bits
