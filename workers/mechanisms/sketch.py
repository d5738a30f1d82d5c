"""Random projections with a fixed seed: fewer numbers a vector, its geometry nearly kept."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

SEED = 0  # one sketch for all: rows, chunks and repeats of a run must see the same


def sketched(x: Tensor, columns: int) -> Tensor:
    """Vectors [..., D] projected to [..., columns] by a Gaussian matrix of mean square 1 / columns.

    0 columns, or no fewer than D, leave them as they are: nothing would be saved.
    """
    width = x.shape[-1]
    if not 0 < columns < width:
        return x
    drawn = torch.randn(width, columns, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    return x @ (drawn / sqrt(columns)).to(x)
