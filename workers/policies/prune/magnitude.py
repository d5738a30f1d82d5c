"""Magnitude pruning."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from studio_state.catalog import Card
from workers.mechanisms.linear import DenseLinear, Replacement, bias_of, matrix_of
from workers.mechanisms.pruning import lowest
from workers.mechanisms.weight_policy import Spot, WeightPolicy
from workers.methods import card, knob


class Magnitude(WeightPolicy):
    """Set the smallest weights of every linear module inside the layers to zero.

    Zhu and Gupta 2017, arXiv:1710.01878: weights are ranked by absolute value within a matrix.
    Deviations: one shot without training, as the baseline in Wanda (arXiv:2306.11695); ranking within
    each output row is offered too. Embeddings and the output head stay. The zeros are stored like any
    other number, so this alone saves no byte and no time.
    """

    card: ClassVar[Card] = card(
        id="magnitude",
        title="Magnitude pruning",
        paper="arXiv:1710.01878",
        stage="prune",
        families=("llm", "vlm", "diffusion", "vit"),
        edits=("weights.mask",),
        effects={"weight_bytes": "same", "zero_weights": "up"},
        neutral={"sparsity": 0.0},
        alters_weights=True,
    )
    convolutions: ClassVar[bool] = True

    sparsity: float = knob(0.5, ge=0.0, le=0.99, help="share of weights set to zero; higher = worse")
    scope: Literal["matrix", "row"] = knob("matrix", help="weights that compete: of the whole matrix, or of each output row")

    def replacement(self, source: nn.Module, spot: Spot) -> Replacement | None:
        """A plain linear module with the pruned weights."""
        if spot.head or self.sparsity == 0:
            return None
        weight = prune(matrix_of(source).detach(), self.sparsity, self.scope == "row")
        pruned = DenseLinear(weight, bias_of(source))
        pruned.zeros = int((weight == 0).sum())
        return pruned


def prune(weight: Tensor, sparsity: float, by_row: bool) -> Tensor:
    """A copy of [N, K] whose floor(sparsity * count) smallest entries by magnitude are 0; of equal ones the first go."""
    groups = weight.abs() if by_row else weight.abs().flatten()[None]
    return weight.masked_fill(lowest(groups, int(sparsity * groups.shape[1])).view_as(weight), 0)
