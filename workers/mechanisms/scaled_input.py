"""Linear maps whose input is transformed before it is multiplied: the weights that are stored live in the transformed space.

Methods that move difficulty between activations and weights (a scale a channel, a rotation) fold the transform into the layer
before. Here it stays inside the replacement, so that any map of any family can have one; its cost is one more operation on the
map's input at every call, and its numbers count as bytes.

Shapes: N output rows, K inputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from workers.mechanisms.linear import Lookup, Replacement


class TransformedInput(Replacement):
    """``y = inner(transform(x))`` for a linear transform; the transform's own numbers are buffers of the subclass.

    Args:
        inner: holds the weights of the transformed space. It is counted as part of this one.
        bias: [N], where it is this one's and not the inner map's.
    """

    def __init__(self, inner: Replacement, bias: Tensor | None = None):
        super().__init__(inner.in_features, inner.out_features, inner.bias if bias is None else bias)
        self.inner: Any = inner
        self.zeros = inner.zeros
        inner.replaces, inner.zeros = 0, None

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        """What the inner map is given, [..., K] in x's dtype."""

    @abstractmethod
    def back(self, weight: Tensor) -> Tensor:
        """Weights [N, K] of the transformed space as float32 weights [N, K] on the map's own input."""

    @abstractmethod
    def own(self) -> Hashable:
        """Equal for equal transforms."""

    @abstractmethod
    def around(self, inner: Replacement) -> Self:
        """Another one with the same transform, its tensors shared."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        y: Tensor = self.inner(self.transform(x))
        return y

    @property
    def bits(self) -> float:
        """Those of the stored weights."""
        return float(self.inner.bits)

    def ledger(self) -> dict[str, int]:
        """That of the inner map; the transform's numbers are among the scales."""
        inside: dict[str, int] = self.inner.ledger()
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        own = self.nbytes() - self.inner.nbytes() - (bias - inside["bias"])
        return {**inside, "scales": inside["scales"] + own, "bias": bias}

    def matrix(self) -> Tensor:
        """The weights on the map's own input, as float32 [N, K]."""
        return self.back(self.inner.matrix())

    def rows(self, ids: Tensor) -> Tensor:
        """Single rows of :meth:`matrix`, ids [n]: float32 [n, K]."""
        return self.back(self.inner.rows(ids))

    def lookup(self, dtype: torch.dtype) -> nn.Module | None:
        """Rows of this very table, if the inner map can read single ones."""
        return Lookup(self, dtype) if hasattr(self.inner, "rows") else None

    def layout(self) -> Hashable:
        """Equal inner layout and equal transform: only then can one input serve all parts."""
        return (*super().layout(), self.inner.layout(), self.own())  # type: ignore[misc]

    @classmethod
    def joined(cls, parts: Sequence[Any]) -> Replacement:
        """The inner rows of all parts behind one transform."""
        inner = type(parts[0].inner).joined([p.inner for p in parts])
        whole: Replacement = parts[0].around(inner)
        return whole


class ScaledInput(TransformedInput):
    """``y = inner(x * scale)``: the inner weights were divided by the scale of their input channel.

    Args:
        inner: holds ``weight / scale``, rounded or not.
        scale: factor of each input channel [K], positive. Maps that share an input may share this tensor, and can be fused then.
    """

    scale: Tensor

    def __init__(self, inner: Replacement, scale: Tensor):
        super().__init__(inner)
        self.register_buffer("scale", scale)

    def transform(self, x: Tensor) -> Tensor:
        """``x * scale``."""
        return x * self.scale.to(x.dtype)

    def back(self, weight: Tensor) -> Tensor:
        """Columns times their scale."""
        return weight * self.scale.float()

    def own(self) -> Hashable:
        """The numbers and their format."""
        return (self.scale.dtype, tuple(self.scale.tolist()))

    def around(self, inner: Replacement) -> Self:
        """The same scale around other weights."""
        return type(self)(inner, self.scale)
