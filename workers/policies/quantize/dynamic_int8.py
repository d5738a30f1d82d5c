"""Dynamic int8."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from studio_state.catalog import Card
from studio_state.errors import SpecError
from workers.mechanisms.int8_activations import ENGINE, DynamicInt8Linear, quantise
from workers.mechanisms.linear import Replacement, bias_of, matrix_of
from workers.mechanisms.weight_policy import QUANTIZES_INPUTS_TOO, Spot, WeightPolicy
from workers.methods import card, knob
from workers.session import Session


class DynamicInt8(WeightPolicy):
    """Store linear weights in 8 bits and multiply with activations rounded to 8 bits on the fly.

    Weights have one symmetric scale an output row. Activations are scaled by token, and use all 8 bits
    where the processor has VNNI (7 elsewhere, where sums could overflow). ``activations=tensor`` is what
    ``torch.ao.quantization.quantize_dynamic`` does: 7 bits and one scale for all tokens of a forward, so
    results depend on how prompts are chunked, and one outlier coarsens all tokens. An embedding tied to
    the output head stays a float table beside the head's packed one.
    """

    card: ClassVar[Card] = card(
        id="dynamic-int8",
        title="Dynamic int8",
        hopes={"decode_tokens_per_s": "up"},
        not_neutral_because="every setting rounds weights and activations to 8 bits",
        requires=(f"cpu:{ENGINE}",),
        dtypes=("float32",),
        devices=("cpu",),
        **QUANTIZES_INPUTS_TOO,
    )
    activations: Literal["token", "tensor"] = knob(
        "token",
        help="what shares an activation scale: each token its own (more exact), or all tokens of a forward (as PyTorch does)",
    )
    head: bool = knob(True, help="quantize the output head too; off = slower, its scores stay exact")

    def check(self, session: Session) -> None:
        """The operators know one number format and one kind of device.

        Raises:
            SpecError: not float32, or not on a CPU.
        """
        if session.dtype != torch.float32 or session.device.type != "cpu":
            raise SpecError(
                f"dynamic-int8 works on float32 models on a CPU; this experiment is {str(session.dtype).removeprefix('torch.')} "
                f"on {session.device.type}: set dtype to float32 and the device to cpu, or take rtn instead"
            )

    def replacement(self, source: nn.Module, spot: Spot) -> Replacement | None:
        """The quantized form of one linear module."""
        if spot.head and not self.head:
            return None
        return DynamicInt8Linear(quantise(matrix_of(source).detach()), bias_of(source), self.activations == "token")

    def weight_factor(self, bits: int) -> float:
        """8 bits a weight over those of the baseline."""
        return 8 / bits
