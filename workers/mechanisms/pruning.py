"""Which weights go, and the base of policies that choose them by what the map is given.

Shapes: N output rows, K inputs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from studio_state.errors import SpecError
from workers.cards import knob
from workers.mechanisms.calibration import Want
from workers.mechanisms.linear import DenseLinear, Replacement, bias_of, matrix_of
from workers.mechanisms.weight_policy import CalibratedPolicy, Spot

PRUNES: dict[str, Any] = {
    "stage": "prune",
    "families": ("llm", "vlm", "diffusion", "vit"),
    "edits": ("weights.mask",),
    "effects": {"weight_bytes": "same", "zero_weights": "up"},
    "neutral": {"sparsity": 0.0, "pattern": "unstructured"},
    "alters_weights": True,
}  # what the cards of policies that set weights to zero by what goes into them have in common

Pattern = Literal["unstructured", "2:4", "4:8"]


def lowest(scores: Tensor, count: int) -> Tensor:
    """True for exactly the ``count`` lowest scores of each row of [G, n]; of equal ones the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.float().kthvalue(count, 1, keepdim=True).values.to(scores.dtype)
    below, equal = scores < limit, scores == limit
    room = count - below.sum(1, keepdim=True)
    return below | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))


def group_of(pattern: Pattern) -> tuple[int, int]:
    """Of n:m, the n weights that go of each m neighbouring inputs, and m."""
    stay, of = map(int, pattern.split(":"))
    return of - stay, of


def lowest_of_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """True for the lowest scores of [N, K] within each m neighbouring inputs of a row, for a pattern n:m."""
    count, of = group_of(pattern)
    return lowest(scores.reshape(-1, of), count).view_as(scores)


class PatternedPolicy(CalibratedPolicy):
    """Base of pruners that rank weights with the help of the inputs' second moment. Embeddings and the output head stay."""

    wants: ClassVar[frozenset[Want] | None] = frozenset({"moment"})

    sparsity: float = knob(
        0.5,
        ge=0.0,
        le=0.99,
        when={"pattern": ["unstructured"]},
        help="share of weights set to zero; higher = worse; the patterns 2:4 and 4:8 always take half",
    )
    pattern: Pattern = knob(
        "unstructured", help="weights that go: wherever the score is low, or two of every four (four of every eight) neighbours"
    )

    @abstractmethod
    def pruned(self, weight: Tensor, moment: Tensor | None) -> Tensor:
        """A matrix [N, K] with the chosen weights at zero.

        Args:
            moment: [K, K] mean of x x^T; None where no calibration input reached the map.
        """

    def in_rows(self, scores: Tensor) -> Tensor:
        """True for the lowest scores of each row of [N, K], or of each group of neighbours, at these knobs."""
        if self.pattern == "unstructured":
            return lowest(scores, int(self.sparsity * scores.shape[1]))
        return lowest_of_groups(scores, self.pattern)

    def replacement(self, source: nn.Module, spot: Spot) -> Replacement | None:
        """A plain linear map with the pruned weights.

        Raises:
            SpecError: the pattern does not divide the width of the map.
        """
        if spot.head or (self.pattern == "unstructured" and self.sparsity == 0):
            return None
        weight = matrix_of(source).detach()
        if self.pattern != "unstructured" and weight.shape[1] % group_of(self.pattern)[1]:
            raise SpecError(
                f"{self.card.id}: pattern = {self.pattern} needs widths that {group_of(self.pattern)[1]} divides, and {spot.name} has "
                f"{weight.shape[1]} inputs; take unstructured, or leave this map out with modules"
            )
        moment = None if spot.seen is None or spot.seen.moment is None else spot.seen.moment.to(weight.device)
        held = source.weight.dtype if isinstance(source, DenseLinear) else weight.dtype
        new = DenseLinear(self.pruned(weight, moment).to(held), bias_of(source))
        new.zeros = int((new.weight == 0).sum())
        return new
