"""HQQ: against its iteration written out in float64, and what it may never do: fit worse than it began, or move a pruned zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.methods.driving import attached, make_session
from workers.mechanisms import packing
from workers.mechanisms.linear import matrix_of
from workers.mechanisms.weight_policy import Spot, targets, weight_bytes, weight_metrics
from workers.policies.prune.magnitude import Magnitude
from workers.policies.quantize.hqq import HQQ, move_zeros
from workers.policies.quantize.rtn import RoundToNearest

GROUP = 32


def heavy(rows: int = 16, width: int = 96) -> Tensor:
    """Weights with outliers, as trained ones have them."""
    pen = torch.Generator().manual_seed(rows)
    w = torch.randn(rows, width, generator=pen) * 0.02
    return w * torch.where(torch.rand(rows, width, generator=pen) > 0.95, 4.0, 1.0)


def bfloat16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.asarray(x)).float().bfloat16().double().numpy()


def errors(weight: Tensor, grid: Tensor, bits: int) -> np.ndarray:
    """|w - w'| of the nearest codes, [N, K/g, g] float64."""
    codes = packing.encode(weight, grid, bits).double().numpy().reshape(len(weight), len(grid), -1) - 2 ** (bits - 1)
    scale, zero = (grid.double().numpy()[..., i].T[..., None] for i in (0, 1))
    return np.abs(weight.double().numpy().reshape(codes.shape) - (codes * scale + zero))


def loss(weights: np.ndarray, scale: float, zero: float, bits: int) -> float:
    """Sum of |error| of one group."""
    levels = np.rint((weights - zero) / scale).clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return float(np.abs(weights - zero - levels * scale).sum())


def reference(weights: np.ndarray, scale: float, zero: float, bits: int, p: float, iterations: int) -> float:
    """The best zero point of one group [g]: the steps of the method one after the other."""
    start, beta, tried = zero, 10.0, []
    for _ in range(iterations + 1):
        levels = np.rint((weights - start) / scale).clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        left = (weights - start) / scale - levels
        tried.append((float((np.abs(left) ** p).sum()), start))
        with np.errstate(divide="ignore", invalid="ignore"):
            shrunk = np.where(left == 0, 0, np.sign(left) * np.maximum(np.abs(left) - np.abs(left) ** (p - 1) / beta, 0))
        start = float(bfloat16(np.mean(weights - shrunk * scale - levels * scale)))
        beta *= 1.01
    return min(tried, key=lambda t: t[0])[1]


@pytest.mark.parametrize(("bits", "p"), [(4, 0.7), (3, 0.7), (2, 0.5), (4, 1.0)])
def test_the_zero_points_are_those_of_the_iteration_written_out(bits: int, p: float) -> None:
    weight = heavy()
    grid = packing.fit_groups(weight, GROUP, bits)
    mine = move_zeros(weight, grid, bits, p, 20)
    assert torch.equal(mine[..., 0], grid[..., 0])
    for row in range(len(weight)):
        for g in range(len(grid)):
            group = weight[row, g * GROUP : (g + 1) * GROUP].double().numpy()
            scale, zero = grid[g, row].tolist()
            wanted, found = reference(group, scale, zero, bits, p, 20), float(mine[g, row, 1])
            # with p = 1 whole stretches of zero points fit equally well, up to the last digit
            assert found == wanted or (
                p == 1 and loss(group, scale, found, bits) == pytest.approx(loss(group, scale, wanted, bits))
            )
    assert (mine[..., 1] != grid[..., 1]).float().mean() > 0.5


@pytest.mark.parametrize("p", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 7])
def test_no_group_fits_worse_than_it_began(bits: int, p: float) -> None:
    weight = heavy(40)
    grid = packing.fit_groups(weight, GROUP, bits)
    mine = move_zeros(weight, grid, bits, p, 20)
    before, after = ((errors(weight, g, bits) ** p).sum(2) for g in (grid, mine))
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < before.sum()


def test_by_hand() -> None:
    """Thirty-one weights of 0.3 and one of 7.9 on steps of 1, which end at 7: the one is let go, and the zero point moves onto the others."""
    weight = torch.tensor([[0.3] * 31 + [7.9]])
    grid = torch.tensor([[[1.0, 0.0]]]).bfloat16()
    mine = move_zeros(weight, grid, 4, 0.7, 20)
    zero = float(mine[0, 0, 1])
    assert zero == pytest.approx(0.3, abs=2**-9)  # one step of bfloat16 there
    assert errors(weight, mine, 4)[0, 0, :31].max() < 2**-9
    assert errors(weight, mine, 4)[0, 0, 31] == pytest.approx(7.9 - 7 - zero, abs=1e-6)


def test_without_iterations_or_without_zero_points_it_is_round_to_nearest() -> None:
    session, found = make_session(), []
    for policy in (RoundToNearest(bits=4), HQQ(iterations=0), HQQ(), RoundToNearest(bits=8), HQQ(bits=8)):
        names = targets(session, policy)
        with attached(session, policy):
            found.append(([matrix_of(session.model.get_submodule(n)) for n in names], weight_bytes(session)))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert not torch.equal(found[0][0][0], found[2][0][0])
    assert all(torch.equal(a, b) for a, b in zip(found[3][0], found[4][0], strict=True))
    assert found[0][1] == found[1][1] == found[2][1]


def test_pruned_groups_keep_their_zero_point() -> None:
    weight = heavy()
    weight[:, ::7] = 0
    weight[:, 64:] = heavy()[:, 64:]  # the last group has none
    grid = packing.fit_groups(weight, GROUP, 4)
    codes, mine = HQQ().codes(weight, grid, 4, Spot("map"))
    assert not mine[:2, :, 1].any()
    assert mine[2, :, 1].any()
    assert not packing.dequantise(codes.T, mine, 4).T[:, :64][weight[:, :64] == 0].any()
    session = make_session()
    with attached(session, Magnitude(sparsity=0.5)):
        masked = weight_metrics(session)["zero_weights"]
    with attached(session, Magnitude(sparsity=0.5), HQQ(head="keep")):
        assert weight_metrics(session)["zero_weights"] >= masked


def test_groups_of_equal_weights_are_left_as_they_are() -> None:
    for value in (0.0, -2.5):
        weight = torch.full((4, 64), value)
        grid = packing.fit_groups(weight, GROUP, 3)
        mine = move_zeros(weight, grid, 3, 0.7, 20)
        assert torch.isfinite(mine.float()).all()
        assert (errors(weight, mine, 3) <= errors(weight, grid, 3)).all()
