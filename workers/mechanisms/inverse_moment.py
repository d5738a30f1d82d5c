"""Optimal brain surgery on one linear map: the inverse of its inputs' second moment, and the sweep over columns that uses it.

A change of one column of a weight matrix is made up for by the columns after it: the change that costs the map's output least,
on inputs with moment M, is along a row of the inverse of M. As a column is settled it leaves the problem; the rows of the upper
Cholesky factor of the inverse are just the inverses of what is left, for every column at once (Frantar & Alistarh 2023, SparseGPT,
arXiv:2301.00774, section 3.3; Frantar et al. 2022, GPTQ, arXiv:2210.17323, section 3.3, step 3).

Shapes: N output rows, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from studio_state.errors import StudioError

Settle = Callable[[int, Tensor], Tensor]
BLOCK = 128  # columns whose updates are held back from the rest; both papers' choice


def damped(moment: Tensor, damp: float) -> Tensor:
    """The moment [K, K] that is worked with: ``damp`` times the mean of its diagonal is added to the diagonal.

    Inputs that are always zero (dead ones) count as independent of all others and as strong as the mean; they are left out of
    that mean. Nothing is so passed on to them or from them, and whatever becomes of their weights costs no output.
    """
    diagonal = moment.diagonal()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else torch.ones((), dtype=moment.dtype, device=moment.device)
    work = moment.masked_fill(dead[:, None] | dead, 0.0)
    work.diagonal().add_(torch.where(dead, mean, torch.zeros_like(mean)) + damp * mean)
    return work


def inverse_factor(moment: Tensor, damp: float = 0.01) -> Tensor:
    """The upper triangular U [K, K], float32, with U^T U = inverse of ``damped(moment, damp)``.

    U[j, j]^2 is the j-th diagonal entry of the inverse moment of inputs j, j + 1, ..., K - 1, and U[j, j:] / U[j, j] its first
    row over that entry. It is the inverse of the upper factor R of R R^T = M, so the inverse itself is never formed. In float32
    where that goes through, else in float64. To settle columns in another order, permute the moment and the weights' columns.

    Args:
        moment: [K, K], mean of x x^T.
        damp: share of the mean of the diagonal that is added to it.

    Raises:
        StudioError: the moment holds numbers that are not finite, or is singular and ``damp`` too small.
    """
    if not bool(moment.isfinite().all()):
        raise StudioError("the inputs of a linear map were infinite or not a number during calibration; use dtype float32")
    for dtype in (torch.float32, torch.float64):
        flipped = damped(moment.to(dtype), damp).flip(0, 1)
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if failed:
            continue
        upper = lower.flip(0, 1)
        eye = torch.eye(len(upper), dtype=dtype, device=upper.device)
        factor = torch.linalg.solve_triangular(upper, eye, upper=True).float()
        if bool(factor.isfinite().all()):
            return factor
    raise StudioError(
        f"the inputs of a linear map lie in fewer dimensions than its {len(moment)}, and their moment has no inverse with damp = {damp}; "
        "raise damp, or samples"
    )


def sweep(weight: Tensor, factor: Tensor, settle: Settle, block: int = BLOCK) -> Tensor:
    """Settle the columns of a matrix from the first to the last, each one's change made up for by those after it.

    Args:
        weight: [N, K]; it is not edited.
        factor: U [K, K] of :func:`inverse_factor`.
        settle: given j and the columns j, ... up to the end of j's block as they stand now [N, n], the final column j [N].
        block: columns of a block; those behind it are updated once a block. Decisions that look at several columns
            (a grid of a group, a mask) must look no further than the end of a block.

    Returns:
        The settled matrix, float32 [N, K].
    """
    work = weight.float().clone()
    for start in range(0, work.shape[1], block):
        stop = min(start + block, work.shape[1])
        errors = torch.empty_like(work[:, start:stop])
        for j in range(start, stop):
            final = settle(j, work[:, j:stop])
            errors[:, j - start] = (work[:, j] - final) / factor[j, j]
            work[:, j] = final
            work[:, j + 1 : stop].addr_(errors[:, j - start], factor[j, j + 1 : stop], alpha=-1)
        work[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return work
