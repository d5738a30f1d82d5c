"""Linear maps by oneDNN instead of the BLAS that PyTorch takes for float32 on the CPU.

A product with one or a few rows reads every weight once and is bound by that. MKL, which ``F.linear`` calls in
float32, does not reach the memory's speed on every processor; oneDNN, which is in the same build of PyTorch,
comes nearer (``make bench``: kernels). The weights stay as they are, nothing is packed or copied. Sums are
ordered differently, so outputs are equal within rounding, not bit by bit.

The operator is PyTorch's own for compiled graphs, without a public name: where a build lacks it, ``None`` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """The map [..., K] -> [..., N] with ``weight`` [N, K] and ``bias`` [N]; None where oneDNN does not take it."""
    if weight.device.type != "cpu" or not weight.is_contiguous() or not takes(weight.dtype):
        return None
    run = torch.ops.mkldnn._linear_pointwise

    def mapped(x: Tensor) -> Tensor:
        out: Tensor = run(x, weight, bias, "none", [], "")
        return out

    return mapped


@cache
def takes(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch on this processor multiplies in a number format by oneDNN."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.float32:
        return True
    return dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
