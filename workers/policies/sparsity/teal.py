"""TEAL."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.calibration import Want
from workers.mechanisms.linear import Replacement
from workers.mechanisms.sparse_inputs import SKIPPED, SparseInput, SparseInputPolicy
from workers.mechanisms.weight_policy import CalibratedPolicy, Spot
from workers.methods import card


class TEAL(SparseInputPolicy, CalibratedPolicy):
    """Multiply only those inputs of a linear map that are larger than a threshold, found once on a calibration text.

    Liu et al. 2024, arXiv:2408.14690, section 4: the threshold of a map is the quantile of the absolute values of its inputs
    at which the share ``keep`` lies above it; a token keeps as many as it has, more or fewer.

    Deviations: every map has the same share; the authors search one for each map of a layer. The quantile is exact on up
    to 256 tokens of the text, not of a histogram. The first tokens of a prompt stay whole, and the rest of it is masked too;
    the authors mask half of a prompt or nearly all. Experts' maps do not know a token's place and mask all of them; those that no
    token of the text visits stay dense. The output head stays dense.
    """

    card: ClassVar[Card] = card(
        id="teal",
        title="TEAL",
        paper="arXiv:2408.14690",
        stage="sparsity",
        families=("llm", "vlm"),
        owns=("activations.sparsity",),
        effects={SKIPPED: "up", "weight_bytes": "same"},
        hopes={"decode_tokens_per_s": "up"},
        neutral={"keep": 1.0},
    )
    wants: ClassVar[frozenset[Want] | None] = frozenset({"sample"})

    def sparse(self, inner: Replacement, spot: Spot) -> SparseInput | None:
        """The map behind its threshold."""
        if spot.seen is None or spot.seen.sample is None:
            return None
        return ThresholdInput(inner, self.keep, threshold(spot.seen.sample, self.keep))


def threshold(sample: Tensor, keep: float) -> float:
    """The size of inputs [r, K] above which the share ``keep`` of them lies (fewer, where several are of just that size)."""
    sizes = sample.abs().flatten()
    left_out = len(sizes) - round(keep * len(sizes))
    return float(sizes.kthvalue(left_out).values) if left_out else -1.0


class ThresholdInput(SparseInput):
    """Multiplies the inputs of each token that are larger than a threshold."""

    def __init__(self, inner: Replacement, keep: float, threshold: float):
        super().__init__(inner, keep)
        self.threshold = threshold

    def chosen(self, x: Tensor) -> Tensor:
        """Those above it."""
        return x.abs() > self.threshold

    def chosen_of_one(self, x: Tensor) -> Tensor:
        """Those of one row."""
        return self.chosen(x).nonzero().view(-1)

    def like(self, inner: Replacement) -> ThresholdInput:
        """The same threshold."""
        return ThresholdInput(inner, self.keep, self.threshold)

    def own(self) -> Hashable:
        """Maps of one input have the same threshold, and can be fused."""
        return self.threshold
