"""What rounding a linear map costs its output, on the inputs that were seen: what searches and budgets of quantizers go by.

Rounding changes the weights by D; on inputs x the output then moves by D x. Its mean square is a sum over the output rows of
d M d^T with the second moment M of the inputs, so that no input has to be kept.

Shapes: N output rows, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.mechanisms import packing
from workers.mechanisms.rounding import plain_grid


def output_error(change: Tensor, moment: Tensor) -> Tensor:
    """Mean square by which each output moves, [N] float32, where the weights are changed by [N, K].

    Args:
        moment: [K, K], mean of x x^T over the inputs.
    """
    change = change.float()
    return ((change @ moment) * change).sum(1).clamp_min_(0)  # rounding errors of the product may leave a small negative sum


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """What round-to-nearest stores for a matrix, float32 [N, K]."""
    done = []
    for rows in weight.split(packing.ROW_CHUNK):
        grid = plain_grid(rows, bits, group)
        done.append(packing.dequantise(packing.encode(rows, grid, bits).T, grid, bits).T)
    return torch.cat(done)
