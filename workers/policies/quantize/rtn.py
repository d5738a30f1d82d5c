"""Weight-only round-to-nearest quantization."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

from torch import nn

from studio_state.catalog import Card
from studio_state.errors import SpecError
from workers.mechanisms.linear import Replacement, matrix_of, replacements, replacing
from workers.mechanisms.packed_linear import Int4Linear, Int8Linear
from workers.methods import Policy, card, knob
from workers.session import Session


class RoundToNearest(Policy):
    """Store linear weights in 8 or 4 bits, each rounded to the nearest point of its grid; activations stay floats.

    The baseline of the quantization literature (no calibration): 8 bits with one symmetric scale a
    row, or 4 bits with scale and zero point a group of inputs; groups that hold exact zeros are coded
    symmetrically, so a pruning mask survives. Scales are bfloat16. On the CPU decode runs on PyTorch's
    weight-only kernels with bfloat16 activations. An embedding tied to the output head is read from
    the head's packed table, which is stored once.
    """

    card: ClassVar[Card] = card(
        id="rtn",
        title="Round-to-nearest",
        stage="quantize",
        families=("llm", "vlm", "vit"),
        owns=("weights.format",),
        effects={"weight_bytes": "down"},
        hopes={"decode_tokens_per_s": "up"},
        neutral=None,
        not_neutral_because="every setting rounds; each weight moves by at most half a step of its grid",
        alters_weights=True,
    )
    bits: Literal[4, 8] = knob(8, help="bits a weight; 4 = smaller and faster, less exact")
    group_size: Literal[32, 64, 128, 256] = knob(
        32, help="with 4 bits: inputs that share a scale; larger = smaller, less exact", fits="divides-widths"
    )
    head: Literal["int8", "same", "keep"] = knob(
        "int8", help="output head and the embedding tied to it: 8 bits a row, the same format as the layers, or as they are"
    )

    def prepare(self, session: Session) -> None:
        """Pack all weights."""
        replacements(session, self)

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Put the packed modules in."""
        return replacing(session, self)

    def replacement(self, source: nn.Module, head: bool) -> Replacement | None:
        """The packed form of one linear module.

        Raises:
            SpecError: the group does not divide the width of the module.
        """
        if head and self.head == "keep":
            return None
        if self.bits == 8 or (head and self.head == "int8"):
            return Int8Linear.of(source)
        width = matrix_of(source).shape[1]
        if width % self.group_size:
            raise SpecError(
                f"rtn: group_size = {self.group_size} does not divide the width {width} of a linear module; choose one that does, or bits=8"
            )
        return Int4Linear.of(source, self.group_size)

    def weight_factor(self, bits: int) -> float:
        """Bits stored, scales and zero points included, over those of the baseline."""
        return (8 if self.bits == 8 else 4 + 32 / self.group_size) / bits
