"""DFloat11."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from studio_state.catalog import Card
from studio_state.errors import SpecError
from workers.mechanisms.dynamic_float import FORMATS, DynamicFloatLinear
from workers.mechanisms.exact_linear import held_matrix
from workers.mechanisms.linear import Replacement, bias_of
from workers.mechanisms.weight_policy import QUANTIZES, Spot, WeightPolicy
from workers.methods import card, knob
from workers.session import Session


class DFloat11(WeightPolicy):
    """Store the exponents of bfloat16 weights in a Huffman code: about 70 % of the bytes, and every bit comes back.

    Zhang et al. 2025, arXiv:2504.11651, by the released code (the paper's text was not at hand): sign and mantissa stay one byte,
    exponents are coded by how often they occur, and each call decodes the weights it needs and forgets them. Outputs are bit for
    bit those of the plain weights; each step takes longer by the decoding. Deviations: one code a matrix, not one a transformer block; codes
    have at most 11 bits, not 32; threads of the paper's kernel find their place from gaps and a count in a first pass, here the
    bytes of each run of 64 weights are stored, so one pass is enough and rows can be read singly; all exponents can be coded,
    infinities and NaN too. An embedding tied to the output head reads rows of the head's table; another one stays.

    A float32 model is taken too (the paper knows bfloat16 alone): where its numbers are bfloat16 numbers they are stored as such,
    else their lower 16 bits are kept as they are, about 83 % of the bytes. float16 is refused. A map that would not get
    smaller stays.
    """

    card: ClassVar[Card] = card(
        id="dfloat11",
        title="DFloat11",
        paper="arXiv:2504.11651",
        **QUANTIZES | {"neutral": {}},
        dtypes=("bfloat16", "float32"),
    )
    convolutions: ClassVar[bool] = True

    head: bool = knob(
        True, help="code the output head too, and the embedding tied to it; off = larger, less to decode at every step"
    )

    def check(self, session: Session) -> None:
        """Only formats with 8 bits of exponent can be coded.

        Raises:
            SpecError: another one.
        """
        if session.dtype not in FORMATS:
            raise SpecError(
                f"dfloat11 codes the 8-bit exponents of bfloat16 and float32 weights; this experiment is "
                f"{str(session.dtype).removeprefix('torch.')}: set dtype to bfloat16"
            )

    def replacement(self, source: nn.Module, spot: Spot) -> Replacement | None:
        """The coded form of one linear map; None where it would not be smaller."""
        weight = held_matrix(source)
        if (spot.head and not self.head) or weight.dtype not in FORMATS:
            return None
        coded = DynamicFloatLinear.of(weight, bias_of(source))
        bias = coded.parts()["bias"]
        return coded if coded.nbytes() - bias < weight.numel() * weight.element_size() else None

    def weight_factor(self, bits: int) -> float:
        """11 of 16 bits; of float32 numbers the lower half is counted in, as it is not known yet whether it is empty."""
        return (bits - 5) / bits

    def why_idle(self, session: Session) -> str:
        """Every map was left alone."""
        return (
            "DFloat11 coded no map: their exponents vary so much, or the maps are so small, that codes take more than they save"
        )
