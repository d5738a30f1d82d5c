"""Quantized activations."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from studio_state.catalog import Card
from workers.mechanisms.linear import Replacement
from workers.mechanisms.rounded_input import RoundedInput
from workers.mechanisms.scaled_input import TransformedInput
from workers.mechanisms.sparse_inputs import wrapped
from workers.mechanisms.weight_policy import Spot, WeightPolicy
from workers.methods import card
from workers.session import Session


class QuantizedActivations(WeightPolicy):
    """Round what goes into the linear maps to 8 bits, so that packed weights take half the products of bytes that 16 bits take.

    Folklore of inference engines (llama.cpp's products of 4- and 8-bit weights): each group of 64 inputs of a token has a scale,
    its largest value becomes 127; beside weights of 4 bits by group, the group is theirs. One to 64 tokens at a time on a CPU
    with AVX-512 VNNI run in a kernel that is compiled on this machine: of maps that ``rtn``, ``gptq``, ``awq``, ``hqq`` or
    ``mixed-bits`` packed in 4 or 8 bits. Everywhere else the rounded inputs are multiplied as floats: the same numbers, and slower.
    """

    card: ClassVar[Card] = card(
        id="quantized-activations",
        title="Quantized activations",
        stage="sparsity",
        families=("llm", "vlm"),
        owns=("activations.format",),
        effects={"weight_bytes": "same"},
        hopes={"decode_tokens_per_s": "up"},
        neutral=None,
        not_neutral_because="every setting rounds activations to 8 bits",
    )

    def replacement(self, source: nn.Module, spot: Spot) -> Replacement | None:
        """The map behind the rounding of its input; where the input is transformed first, the rounding comes after that."""
        return rounded(wrapped(source))

    def why_idle(self, session: Session) -> str:
        """Why nothing was rounded."""
        return f"{self.card.title} found no linear map to act on; those of a model that was packed and exported cannot be wrapped"


def rounded(source: Replacement) -> Replacement:
    """What multiplies, behind the rounding of its input."""
    if isinstance(source, TransformedInput):
        return source.around(rounded(wrapped(source.inner)))
    return RoundedInput(source)
