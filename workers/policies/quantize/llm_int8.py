"""LLM.int8()."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar

from torch import Tensor, nn

from studio_state.catalog import Card
from workers.mechanisms.linear import Replacement, bias_of, matrix_of
from workers.mechanisms.token_rounding import Int8Product, row_codes
from workers.mechanisms.weight_policy import QUANTIZES_INPUTS_TOO, Spot, WeightPolicy
from workers.methods import card, knob


class OutlierInt8(Int8Product):
    """8-bit products, but for the input features that hold an outlier in this call: they are multiplied as floats.

    Args:
        codes: int8 [N, K]; scales: float32 [N]; bias: [N].
        threshold: absolute value above which an input is an outlier.
    """

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float):
        super().__init__(codes, scales, bias)
        self.threshold = threshold

    def product(self, x: Tensor) -> Tensor:
        """Rows [m, K] -> float32 [m, N], without bias."""
        outlying = (x.abs() > self.threshold).any(0)
        features = outlying.nonzero()[:, 0]
        if not len(features):
            return super().product(x)
        exact = x[:, features].float() @ (self.codes[:, features].float() * self.scales[:, None]).T
        return super().product(x.masked_fill(outlying, 0)).add_(exact)

    def facts(self) -> dict[str, Any]:
        """What an outlier is."""
        return {"threshold": self.threshold}

    def layout(self) -> Hashable:
        """Equal threshold."""
        return (*super().layout(), self.threshold)  # type: ignore[misc]


class LLMInt8(WeightPolicy):
    """Store weights in 8 bits and multiply with 8-bit activations, but keep the input features with outliers in floats.

    Dettmers et al. 2022, arXiv:2208.07339, section 3: vector-wise quantization (section 3.1; a scale a token and a scale a
    row of weights) and mixed-precision decomposition (section 3.2, equation 8): input features in which any token of this call
    exceeds the threshold are taken out of the 8-bit product, and out of its scales, and multiplied as floats. Which
    features these are is found anew at every call, so it depends on how prompts are chunked and batched.

    Deviations: where the paper keeps the outlier features' weights in 16 bits, they are dequantised from the 8-bit codes
    that are stored for all features, as in the released inference code (bitsandbytes): otherwise, outliers being found only
    when the model runs, every weight would have to be stored twice. Scales are float32.
    """

    card: ClassVar[Card] = card(
        id="llm-int8",
        title="LLM.int8()",
        paper="arXiv:2208.07339",
        not_neutral_because="every setting rounds the weights to 8 bits",
        **QUANTIZES_INPUTS_TOO,
    )
    threshold: float = knob(
        6.0,
        ge=0.0,
        le=10000.0,
        help="absolute value above which an input is an outlier; higher = fewer of them, faster, less exact; 0 = all products in floats",
    )
    head: bool = knob(True, help="quantize the output head too; off = slower, its scores stay exact (as in the released code)")

    def replacement(self, source: nn.Module, spot: Spot) -> Replacement | None:
        """8-bit weights that look for outliers at every call."""
        if spot.head and not self.head:
            return None
        return OutlierInt8(*row_codes(matrix_of(source).detach()), bias_of(source), self.threshold)

    def weight_factor(self, bits: int) -> float:
        """8 bits a weight over those of the baseline."""
        return 8 / bits
