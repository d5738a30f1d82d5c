"""Several linear maps of one input as one map: one read of the input, one call, fewer and larger products.

The parts keep their places in the model. Stand-ins answer there from the fused map, so that whoever
calls a part (the library's own forward in the prefill) computes all of them at once, and the lane holds
the fused weights instead of the parts', not both.

Shapes: K input width, N output width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from workers.mechanisms.linear import Replacement


def is_hooked(module: nn.Module) -> bool:
    """True if somebody looks at, or changes, what goes into or out of this module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def fuse(parts: Sequence[nn.Module]) -> Fused | None:
    """One map for several of the same input; None where the parts do not agree. The originals are not changed.

    Plain linears must agree in dtype, device and in having a bias; replacements decide by themselves
    (:meth:`~workers.mechanisms.linear.Replacement.fuse`).
    """
    kind = type(parts[0])
    if any(type(p) is not kind for p in parts):
        return None
    if issubclass(kind, Replacement):
        whole = kind.fuse(parts)
    else:
        whole = _fuse_plain(parts) if kind is nn.Linear else None  # type: ignore[arg-type]
    return None if whole is None else Fused(whole, [p.out_features for p in parts])  # type: ignore[misc]


def _fuse_plain(parts: Sequence[nn.Linear]) -> nn.Linear | None:
    first = parts[0].weight
    if any(
        p.weight.dtype != first.dtype or p.weight.device != first.device or p.in_features != parts[0].in_features for p in parts
    ):
        return None
    biases = [p.bias for p in parts if p.bias is not None]
    if len(biases) not in (0, len(parts)):
        return None
    rows = sum(p.out_features for p in parts)
    whole = nn.Linear(parts[0].in_features, rows, bias=False, device="meta")
    whole.weight = nn.Parameter(torch.cat([p.weight for p in parts]), requires_grad=False)
    whole.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return whole


class Fused(nn.Module):
    """A fused map and the stand-ins for its parts.

    Args:
        whole: [..., K] -> [..., N1 + N2 + ...].
        sizes: output widths N1, N2, ... of the parts.
    """

    def __init__(self, whole: nn.Module, sizes: Sequence[int]):
        super().__init__()
        self.whole, self.sizes = whole, list(sizes)
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def stand_ins(self) -> list[FusedPart]:
        """One module per part, to be put where the part stood."""
        return [FusedPart(self, i) for i in range(len(self.sizes))]

    def forward(self, x: Tensor) -> Tensor:
        """All parts [..., N1 + N2 + ...] of x [..., K]."""
        out: Tensor = self.whole(x)
        return out

    def part(self, x: Tensor, index: int) -> Tensor:
        """One part [..., N] of x; the others wait until they are asked for with the same tensor."""
        if self._input is not x or index not in self._waiting:
            self._input, self._waiting = x, dict(enumerate(self.whole(x).split(self.sizes, -1)))
        out = self._waiting.pop(index)
        if not self._waiting:
            self._input = None
        return out


class FusedPart(nn.Module):
    """Stands where one of the fused parts stood."""

    def __init__(self, fused: Fused, index: int):
        super().__init__()
        self.fused, self.index = fused, index

    def forward(self, x: Tensor) -> Tensor:
        """The part's output [..., N] of x [..., K]."""
        return self.fused.part(x, self.index)
