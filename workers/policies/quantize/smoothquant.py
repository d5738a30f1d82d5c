"""SmoothQuant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from studio_state.catalog import Card
from workers.mechanisms.calibration import Want, gathered, sharing_inputs
from workers.mechanisms.int8_activations import ENGINE, DynamicInt8Linear, quantise
from workers.mechanisms.linear import Replacement, bias_of, matrix_of
from workers.mechanisms.scaled_input import ScaledInput
from workers.mechanisms.token_rounding import Int8Product, row_codes
from workers.mechanisms.weight_places import places
from workers.mechanisms.weight_policy import QUANTIZES_INPUTS_TOO, CalibratedPolicy, Spot
from workers.methods import card, knob
from workers.session import Session


class Smoothing(NamedTuple):
    """What is decided for the whole model.

    Attributes:
        factors: s of each input channel, float32 [K] by map; maps that no calibration input reached have none.
        packed: products run on fbgemm's packed weights.
        tied: the embedding reads the head's table, which must not be packed away then.
    """

    factors: Mapping[str, Tensor]
    packed: bool
    tied: bool = False


class SmoothQuant(CalibratedPolicy):
    """Store weights and activations in 8 bits, after dividing large input channels by a scale and multiplying their weights.

    Xiao et al. 2022, arXiv:2211.10438, section 4: input channel j is divided by ``s_j = max|X_j|^alpha / max|W_j|^(1-alpha)``
    (equation 4), the largest absolute values on calibration inputs and over all maps that share this input. What is computed
    stays the same (equation 3), but outliers no longer coarsen the other channels of a token.

    Deviations: s is applied to the map's input inside its replacement, instead of being folded into the norm before; so maps
    behind no norm (``o_proj``, ``down_proj``) have one too, for four bytes an input channel and one multiplication at every
    call. Activations have a scale a token, found at every call (the paper's O1); weights have one a row, where the paper has
    one a tensor. Attention's own products stay floats. A channel whose activations or weights are all zero has s = 1.
    float32 models on a CPU run on fbgemm's kernels, with a zero point for activations; everything else runs on symmetric
    codes, and so does a head whose table a tied embedding reads. Both multiply integers. Maps that no calibration input
    reaches are rounded without scales.
    """

    card: ClassVar[Card] = card(
        id="smoothquant",
        title="SmoothQuant",
        paper="arXiv:2211.10438",
        hopes={"decode_tokens_per_s": "up"},
        not_neutral_because="every setting rounds weights and activations to 8 bits",
        **QUANTIZES_INPUTS_TOO,
    )
    wants: ClassVar[frozenset[Want] | None] = frozenset()

    alpha: float = knob(
        0.5,
        ge=0.0,
        le=1.0,
        help="how much of the difficulty moves from activations to weights; 0.5 shares it evenly, 1 moves all",
    )
    head: bool = knob(True, help="quantize the output head too; off = slower, its scores stay exact (as in the paper)")

    def plan(self, session: Session, names: Sequence[str]) -> Smoothing:
        """One s for all maps of an input."""
        if not self.head:
            names = [n for n in names if n != places(session).head]
        factors: dict[str, Tensor] = {}
        for _, seen in gathered(session, names, frozenset(), self.samples):
            for maps in sharing_inputs(seen).values():
                weight = torch.stack([matrix_of(session.model.get_submodule(n)).float().abs().amax(0) for n in maps]).amax(0)
                inputs = torch.stack([seen[n].max_abs for n in maps]).amax(0).to(weight.device)
                factors.update(dict.fromkeys(maps, smoothing(inputs, weight, self.alpha)))
        packed = session.device.type == "cpu" and session.dtype == torch.float32
        packed = packed and ENGINE in torch.backends.quantized.supported_engines
        return Smoothing(factors, packed, places(session).embedding is not None)

    def replacement(self, source: nn.Module, spot: Spot) -> Replacement | None:
        """8-bit weights behind the scales of their input."""
        if spot.head and not self.head:
            return None
        weight, bias, factor = matrix_of(source).detach().float(), bias_of(source), spot.plan.factors.get(spot.name)
        weight = weight if factor is None else weight * factor
        packed = spot.plan.packed and not (spot.head and spot.plan.tied)
        inner = DynamicInt8Linear(quantise(weight), bias, True) if packed else Int8Product(*row_codes(weight), bias)
        return inner if factor is None else ScaledInput(inner, 1 / factor)

    def weight_factor(self, bits: int) -> float:
        """8 bits a weight over those of the baseline."""
        return 8 / bits


def smoothing(inputs: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s of each input channel [K] from the largest absolute values of its inputs [K] and of its weights [K]."""
    s = inputs.pow(alpha) / weight.pow(1 - alpha)
    return torch.where((inputs > 0) & (weight > 0), s, torch.ones_like(s))
