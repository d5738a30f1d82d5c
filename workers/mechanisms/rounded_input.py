"""Linear maps whose inputs are rounded to 8 bits, a scale for each group of inputs of a token.

Every token has scales of its own, found at every call, so batching, chunking and fusing do not change a number. Beside weights
that are packed in 4 or 8 bits a few rows are multiplied as integers, where a kernel for it can be compiled; everywhere else
the rounded inputs are multiplied as floats, which gives the same numbers and saves nothing.

Shapes: K inputs, g group, N output rows.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.mechanisms.linear import Replacement
from workers.mechanisms.packed_linear import Int4Linear, PackedLinear
from workers.mechanisms.packed_rows import GROUP, ROWS, Product
from workers.mechanisms.scaled_input import TransformedInput

TOP = 127  # codes are -127..127


def by_group(x: Tensor, group: int, top: int = TOP) -> tuple[Tensor, Tensor]:
    """Codes, whole numbers of float32 [..., K/g, g], and steps float32 [..., K/g, 1] of x [..., K]; the last group is filled with 0.

    The step of a group is its largest absolute value over ``top``; numbers halfway between two codes get the even one.
    """
    grouped = F.pad(x.float(), (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    largest = grouped.abs().amax(-1, keepdim=True)
    times = torch.where(largest > 0, torch.full_like(largest, top) / largest, torch.zeros_like(largest))
    return (grouped * times).round_(), largest / top


class RoundedInput(TransformedInput):
    """``y = inner(x rounded to 8 bits)``.

    Args:
        inner: holds the weights.

    Attributes:
        group: inputs that share a scale: those that share one in the weights of 4 bits, else 64.
    """

    def __init__(self, inner: Replacement):
        super().__init__(inner)
        self.group = inner.group if isinstance(inner, Int4Linear) else GROUP

    @property
    def product(self) -> Product | None:
        """Our own product of the rounded inputs, without bias; None where there is none."""
        return self.inner.product(input_bits=8) if isinstance(self.inner, PackedLinear) else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        product = self.product if x.is_cpu and x.numel() <= ROWS * self.in_features else None
        if product is None:
            y: Tensor = self.inner(self.transform(x))
            return y
        if x.dtype == torch.float32 and x.is_contiguous():
            y = product(x)
        else:
            y = product(x.float().contiguous()).to(x.dtype)
        bias = self._buffers["bias"]
        return y if bias is None else y + bias

    def transform(self, x: Tensor) -> Tensor:
        """x as its codes stand for it."""
        codes, step = by_group(x, self.group)
        return (codes * step).flatten(-2)[..., : x.shape[-1]].to(x.dtype)

    def back(self, weight: Tensor) -> Tensor:
        """The weights are what they were."""
        return weight

    def own(self) -> Hashable:
        """The group."""
        return self.group

    def around(self, inner: Replacement) -> Self:
        """The same rounding in front of other weights."""
        return type(self)(inner)
