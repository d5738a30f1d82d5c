"""Binary coding of weights: every group is a sum of a few scaled patterns of plus and minus one, ``w ~ sum_b alpha_b beta_b + z``.

Bit b of a weight's code says which sign its group's ``alpha_b`` has in it. Uniform grids are the special case in which each alpha
is twice the one before. The stored offset is ``z + alpha_0``: of a uniform grid that is its own zero point, so the bfloat16
numbers of such a grid are kept as they are and the weights come out the same to the last bit.

Park et al., LUT-GEMM, arXiv:2206.09557 (the format, uniform grids in it, and the fit as in the authors' code); alternating is from
Xu et al., Alternating multi-bit quantization, arXiv:1802.00150.

Shapes: N output rows, K inputs, g inputs of a group, G = K/g groups of a row, R groups, b bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.mechanisms.levels import Line, nearest

ROUNDS = 15  # of alternating, as in the authors' code
_AT_ONCE = 1 << 21  # weights fitted at once


def fit(weight: Tensor, group: int, bits: int, rounds: int = ROUNDS, offset: bool = False) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K] and the numbers they stand on, bfloat16 [G, N, b] (with an offset [G, N, b + 1]), for [N, K].

    The numbers are rounded to bfloat16 first and the codes chosen on what is stored.

    Args:
        rounds: of alternating after the greedy start; 0 = greedy.
    """
    grouped = weight.float().unflatten(1, (-1, group))  # [N, G, g]
    codes, numbers = [], []
    for values in grouped.flatten(0, 1).split(max(1, _AT_ONCE // group)):
        alphas, z = greedy(values, bits, offset)
        line = Line.of(values)
        for _ in range(rounds):
            better, z = refined(line, alphas, z)
            if torch.equal(better, alphas):
                break
            alphas = better
        kept = alphas.bfloat16().float()
        stored = [kept] if z is None else [kept, (z + kept[:, :1]).bfloat16().float()]
        codes.append(nearest(values, levels(kept, None if z is None else stored[1] - kept[:, :1])))
        numbers.append(torch.cat(stored, 1).bfloat16())
    grid = torch.cat(numbers).unflatten(0, grouped.shape[:2])  # [N, G, b (+ 1)]
    return torch.cat(codes).view(weight.shape), grid.transpose(0, 1).contiguous()


def greedy(values: Tensor, bits: int, offset: bool = False) -> tuple[Tensor, Tensor | None]:
    """The first fit of values [R, g]: alphas [R, b] ascending, and z [R, 1] or None. Each alpha is the mean size of what is left."""
    z = values.mean(1, keepdim=True) if offset else None
    left, alphas = values if z is None else values - z, []
    for _ in range(bits):
        alphas.append(left.abs().mean(1, keepdim=True))
        left = left - torch.where(left < 0, -alphas[-1], alphas[-1])
    return torch.cat(alphas[::-1], 1), z


def refined(line: Line, alphas: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One round of alternating: the nearest codes, then the alphas (and z) of least squares on them.

    A group keeps what it had if that was better, so the error never rises.

    Args:
        line: the values.
    """
    points, order = levels(alphas, z).double().sort(1)
    size, total = line.cells(points)
    patterns = _patterns(alphas.shape[1], z is not None, points)[order]  # [R, 2^b, b (+ 1)]
    square = (patterns * size[..., None]).mT @ patterns
    square.diagonal(dim1=1, dim2=2).add_(1e-6)  # two equal patterns have no single answer
    found = torch.linalg.solve(square, patterns.mT @ total[..., None])[..., 0].to(alphas.dtype)
    new = found[:, : alphas.shape[1]].abs().sort(1).values  # a minus sign turns a pattern around, which the next codes do
    new_z = None if z is None else found[:, alphas.shape[1] :]
    worse = error(line, new, new_z) >= line.error(points, size, total)
    return torch.where(worse, alphas, new), None if z is None or new_z is None else torch.where(worse, z, new_z)


def error(line: Line, alphas: Tensor, z: Tensor | None) -> Tensor:
    """Summed squared distance of values from the nearest sums: float64 [R, 1]."""
    points = levels(alphas, z).double().sort(1).values
    return line.error(points, *line.cells(points))


def levels(alphas: Tensor, z: Tensor | None) -> Tensor:
    """The sum that each code stands for: alphas [R, b], z [R, 1] or None -> [R, 2^b]."""
    sums = alphas @ _patterns(alphas.shape[1], False, alphas).T
    return sums if z is None else sums + z


def _patterns(bits: int, offset: bool, like: Tensor) -> Tensor:
    """Signs of every code, and a column of ones for the offset: [2^b, b (+ 1)]."""
    codes = torch.arange(2**bits, device=like.device)
    columns = [signs(codes, b, like.dtype) for b in range(bits)]
    return torch.stack(columns + [torch.ones_like(columns[0])] * offset, 1)


def signs(codes: Tensor, bit: int, dtype: torch.dtype) -> Tensor:
    """Bit ``bit`` of codes as -1 and 1."""
    return ((codes >> bit) & 1).to(dtype) * 2 - 1


def of_grid(grid: Tensor, bits: int) -> Tensor:
    """A uniform grid (scale, zero) bfloat16 [G, N, 2] as numbers [G, N, b + 1] of binary coding, for the same codes.

    ``(code - 2^(b-1)) scale + zero`` is ``sum_i scale 2^(i-1) beta_i + (zero - scale / 2)``; powers of two keep bfloat16 exact.
    """
    scale, zero = grid[..., :1], grid[..., 1:]
    return torch.cat([scale * 2.0 ** (i - 1) for i in range(bits)] + [zero], -1)
