"""Linear maps whose weights are kept bit for bit in another form, decoded whole at every call.

The decoded matrix is multiplied in one piece and in the memory order of the original: products of slices may be summed in
another order, and then outputs would not be those of the plain map to the last bit. One decoded matrix lives at a time.

Shapes: N output rows, K inputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.mechanisms.linear import Convolved, DenseLinear, Replacement, join_bias, matrix_of


class ExactLinear(Replacement):
    """What such maps share.

    Attributes:
        number_format: of the decoded weights.
    """

    number_format: torch.dtype

    @abstractmethod
    def decoded(self) -> Tensor:
        """The weights [N, K] in their own number format."""

    @classmethod
    @abstractmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """Weights [N, K] in this form."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return F.linear(x, self.decoded().to(x.dtype), self.bias)

    def matrix(self) -> Tensor:
        """The weights as float32 [N, K]."""
        return self.decoded().float()

    def table_bytes(self, *names: str) -> int:
        """Bytes of some of its buffers; one that is not there takes none."""
        return sum(0 if t is None else t.numel() * t.element_size() for t in (self._buffers[n] for n in names))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Rows of all parts, coded anew."""
        return cls.of(torch.cat([p.decoded() for p in parts]), join_bias(parts))

    def layout(self) -> Hashable:
        """Same width and number format."""
        return (*super().layout(), self.number_format)  # type: ignore[misc]


def held_matrix(source: object) -> Tensor:
    """Weights [N, K] of a linear module in the number format it holds them in, where it holds plain ones; else as float32."""
    inner = source.inner if isinstance(source, Convolved) else source
    return (inner.weight if isinstance(inner, DenseLinear) else matrix_of(inner)).detach()
