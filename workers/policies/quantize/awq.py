"""AWQ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from studio_state.catalog import Card
from workers.mechanisms import packing
from workers.mechanisms.calibration import Want, gathered, sharing_inputs
from workers.mechanisms.linear import DenseLinear, Replacement, bias_of, matrix_of
from workers.mechanisms.output_error import output_error, rounded
from workers.mechanisms.rounding import ROW_BITS, GroupedPolicy
from workers.mechanisms.scaled_input import ScaledInput
from workers.mechanisms.weight_places import places
from workers.mechanisms.weight_policy import QUANTIZES, CalibratedPolicy, Spot
from workers.methods import card, knob
from workers.session import Session

CLIPS = [1 - i / 20 for i in range(10)]  # shares of a group's range that are tried; the released code's
UNCLIPPED = ("q", "k", "query", "key", "to_q", "to_k", "q_proj", "k_proj")  # their product is what matters, as it says there


class AWQ(CalibratedPolicy, GroupedPolicy):
    """Scale up the weights of inputs that are large on average before rounding, and the inputs down, so that these lose less.

    Lin et al. 2023, arXiv:2306.00978, section 3.2 and equation 5: an input channel's scale is its mean absolute value to the
    power alpha; alpha is searched on a grid from 0 (no scales: ``rtn``) for the least error of the output. Scales are normalised
    by the root of the largest times the smallest, and groups are clipped to the share of their range (1 to 0.55) with the least
    error, both as in the released code, which leaves queries and keys unclipped.

    Deviations: the scale is applied to the map's input inside its replacement, instead of being folded into the layer before;
    so every map of every family has one, for two bytes an input channel and one multiplication at every call. Maps of the same
    input share one, so that lean-decode can fuse them. The error is that of these maps' own outputs, exact on all
    calibration inputs by their second moment, not that of the attention or MLP they belong to. Clipping shrinks both ends of
    a group's range, and a row keeps it only where it lowers the error of the whole row. With 8 bits, in rows, nothing is
    clipped. Maps that no calibration input reaches are rounded to the nearest. Convolutions stay as they are.
    """

    card: ClassVar[Card] = card(
        id="awq",
        title="AWQ",
        paper="arXiv:2306.00978",
        hopes={"decode_tokens_per_s": "up"},
        not_neutral_because="every setting rounds; with one step of the search and no clipping it is round-to-nearest",
        **QUANTIZES,
    )
    wants: ClassVar[frozenset[Want] | None] = frozenset({"moment"})

    bits: int = knob(4, ge=2, le=8, help="bits a weight; fewer = smaller, less exact; 4 and 8 have fast CPU kernels, others none")
    steps: int = knob(20, ge=1, le=100, help="values of alpha from 0 to below 1 that are tried; 1 = no scales, as rtn")
    clip: bool = knob(True, help="also search which share of its range a group's grid should span")

    def plan(self, session: Session, names: Sequence[str]) -> Any:
        """Factor of each input channel [K] by map, the same tensor for maps of one input; maps without one are not in it."""
        head = places(session).head
        inside = [n for n in names if n != head or self.head == "same"]
        sharing: dict[str, list[str]] = {}
        for _, seen in gathered(session, inside, frozenset(), self.samples):
            for first, names in sharing_inputs(seen).items():
                sharing.setdefault(first, []).extend(names)
        found: dict[str, Tensor] = {}
        for group, seen in gathered(session, list(sharing), frozenset({"moment"}), self.samples):
            for first in group:
                session.check_cancelled()
                session.say(f"{self.card.title}: scale of {first}", None)
                weights = [matrix_of(session.model.get_submodule(n)).detach().float() for n in sharing[first]]
                factor = self.factor(torch.cat(weights), seen[first].mean_abs, seen[first].moment)
                found.update({} if factor is None else dict.fromkeys(sharing[first], factor))
        return found

    def factor(self, weight: Tensor, mean_abs: Tensor, moment: Tensor | None) -> Tensor | None:
        """What to multiply inputs with, bfloat16 [K], for the least error of a matrix [N, K]; None where no scale is best."""
        best, least = None, torch.inf
        if moment is None or (self.bits < ROW_BITS and weight.shape[1] % self.group_size):
            return None  # the latter is told when the map's turn comes
        for step in range(self.steps):
            factor = input_factor(mean_abs, step / self.steps).to(weight.device)
            change = rounded(weight / factor, self.bits, self.group_size) * factor - weight
            error = float(output_error(change, moment.to(weight.device)).sum(dtype=torch.float64))
            if error < least:
                best, least = (factor if step else None), error
        return best

    def replacement(self, source: nn.Module, spot: Spot) -> Replacement | None:
        """Scaled weights, packed, behind the factor of their input."""
        factors: Mapping[str, Tensor] = spot.plan or {}
        if spot.name not in factors:
            return super().replacement(source, spot)
        factor = factors[spot.name]
        inner = super().replacement(DenseLinear(matrix_of(source).detach() / factor.float(), bias_of(source)), spot)
        return None if inner is None else ScaledInput(inner, factor)

    def codes(self, weight: Tensor, grid: Tensor, bits: int, spot: Spot) -> tuple[Tensor, Tensor]:
        """Codes uint8 [N, K] of scaled weights [N, K], and their clipped grid [K/g, N, 2]."""
        last = spot.name.rpartition(".")[2]
        if self.clip and bits < ROW_BITS and spot.seen and spot.seen.moment is not None and last not in UNCLIPPED:
            factor = (spot.plan or {}).get(spot.name, torch.ones(1)).float().to(weight.device)
            grid = clipped(weight, grid, bits, spot.seen.moment.to(weight.device) * factor * factor[:, None])
        return packing.encode(weight, grid, bits), grid


def input_factor(mean_abs: Tensor, alpha: float) -> Tensor:
    """One over the normalised scale of each input channel, bfloat16 [K]; all ones for alpha = 0."""
    scale = mean_abs.pow(alpha).clamp_min(1e-4)
    return ((scale.max() * scale.min()).sqrt() / scale).bfloat16()


def clipped(weight: Tensor, grid: Tensor, bits: int, moment: Tensor) -> Tensor:
    """The grid [K/g, N, 2] with the range of each group shrunk to where its own error on [K, K] is least.

    A row of [N, K] whose whole error does not fall by that keeps its grid.
    """
    count, group = grid.shape[0], weight.shape[1] // grid.shape[0]
    blocks = torch.stack([moment[a : a + group, a : a + group] for a in range(0, len(moment), group)])  # [K/g, g, g]
    best, least = grid, torch.full(grid.shape[:2], torch.inf, device=weight.device)
    for share in CLIPS:
        new = packing.fit_groups(weight, group, bits, share)
        change = change_on(weight, new, bits).unflatten(1, (count, group)).transpose(0, 1)  # [K/g, N, g]
        error = ((change @ blocks) * change).sum(2)
        better = error < least
        best, least = torch.where(better[..., None], new, best), torch.where(better, error, least)
    before, after = (output_error(change_on(weight, g, bits), moment) for g in (grid, best))
    return torch.where((after < before)[None, :, None], best, grid)


def change_on(weight: Tensor, grid: Tensor, bits: int) -> Tensor:
    """What rounding to a grid [K/g, N, 2] changes, [N, K]."""
    return packing.dequantise(packing.encode(weight, grid, bits).T, grid, bits).T - weight.float()
