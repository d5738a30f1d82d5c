"""QuaRot."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from studio_state.catalog import Card
from studio_state.resources import Use
from workers.mechanisms import packing
from workers.mechanisms.hadamard import RotatedInput, rotate, signs
from workers.mechanisms.linear import Replacement
from workers.mechanisms.packed_linear import stored
from workers.mechanisms.rounding import GroupedPolicy, plain_grid
from workers.mechanisms.weight_policy import QUANTIZES, Spot
from workers.methods import card, knob


class QuaRot(GroupedPolicy):
    """Rotate inputs and weights of every linear map by a random Hadamard transform, which spreads outliers, then round both.

    Ashkboos et al. 2024, arXiv:2404.00456, section 4: the rotation is orthogonal, so the map computes the same; after it no
    channel stands out, and activations can be rounded to 4 bits, symmetrically with one scale a token, clipped at 0.9 of its
    largest value (section 5).

    Deviations: the input is rotated inside each map's replacement at every call, where the paper folds most rotations into
    the weights of neighbouring layers and leaves only some online: so any map of any family is rotated, at the cost of a
    transform of its input (in float32) and one byte an input channel. Widths without a Hadamard matrix here are rotated in blocks
    of their largest power of two. Weights are rounded to the nearest on grids by group, where the paper has GPTQ or rounding
    with a scale a row. Products of rounded activations are taken in floats, on whole numbers: their error is that of 4-bit
    products, their speed is not. The cache is not rounded: put ``kivi`` beside it. A pruning mask does not survive: rotated zeros
    are no zeros. The head is not rotated unless ``head=same``. Convolutions stay as they are.
    """

    card: ClassVar[Card] = card(
        id="quarot",
        title="QuaRot",
        paper="arXiv:2404.00456",
        spoils=("weights.mask",),
        uses=(Use(resource="activations.format", mode="owns", when={"activation_bits": [4, 8]}),),
        not_neutral_because="every setting rounds the weights",
        **QUANTIZES,
    )
    bits: int = knob(4, ge=2, le=8, help="bits a weight; fewer = smaller, less exact; 4 and 8 have fast CPU kernels, others none")
    activation_bits: Literal[4, 8, 16] = knob(4, help="bits of what goes into a map; fewer = less exact; 16 = not rounded")
    clip: float = knob(
        0.9, ge=0.5, le=1.0, help="below 16 activation bits: share of a token's largest value that its grid spans; 1 = all"
    )
    seed: int = knob(0, ge=0, le=2**31 - 1, help="of the random signs; another seed turns otherwise")

    def codes(self, weight: Tensor, grid: Tensor, bits: int, spot: Spot) -> tuple[Tensor, Tensor]:
        """Codes uint8 [N, K] of the rotated matrix, and the grid [K/g, N, 2] that spans it."""
        turned = rotate(weight, signs(weight.shape[1], self.seed).to(weight.device))
        grid = plain_grid(turned, bits, weight.shape[1] // grid.shape[0])
        return packing.encode(turned, grid, bits), grid

    def packed(self, codes: Tensor, grid: Tensor, bits: int, bias: Tensor | None, spot: Spot) -> Replacement:
        """The packed codes behind the rotation of their input."""
        turn = signs(codes.shape[1], self.seed).to(codes.device)
        return RotatedInput(stored(codes, grid, bits, None), turn, self.activation_bits, self.clip, bias)
