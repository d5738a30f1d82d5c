"""GPTQ: against a plain float64 sweep with an explicit inverse, by hand, and against round-to-nearest on the inputs that were seen."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.methods.driving import attached, make_session
from workers.mechanisms import packing
from workers.mechanisms.calibration import Seen, gathered
from workers.mechanisms.linear import matrix_of
from workers.mechanisms.output_error import output_error
from workers.mechanisms.weight_policy import Spot, targets, weight_bytes, weight_metrics
from workers.policies.prune.magnitude import Magnitude
from workers.policies.quantize.gptq import GPTQ
from workers.policies.quantize.rtn import RoundToNearest

SHAPES = ((4, 32), (3, 16), (2, 32), (8, 64))  # bits and group of 64 inputs


def seen(moment: Tensor) -> Spot:
    return Spot("map", seen=Seen(100, torch.ones(len(moment)), torch.ones(len(moment)), moment, None, "map"))


def problem(rows: int = 24, width: int = 64, correlated: bool = True) -> tuple[Tensor, Tensor]:
    """Weights [N, K], and the moment [K, K] of inputs that depend on each other and differ in size."""
    torch.manual_seed(rows + width)
    size = torch.rand(width) * 3 + 0.2
    x = torch.randn(400, width // 4) @ torch.randn(width // 4, width) + 0.5 * torch.randn(400, width)
    x = x * size
    moment = x.T @ x / 400 if correlated else (size * size).diag()
    return torch.randn(rows, width) * 0.05, moment


def plain(weight: Tensor, bits: int, group: int) -> Tensor:
    return packing.fit_rows(weight) if bits == 8 else packing.fit_groups(weight, group, bits)


def values(codes: Tensor, grid: Tensor, bits: int) -> Tensor:
    return packing.dequantise(codes.T, grid, bits).T


def reference(weight: Tensor, moment: Tensor, bits: int, group: int, act_order: bool = False) -> np.ndarray:
    """Codes [N, K] by greedy optimal brain quantization in a fixed order: the inverse of what is left is written out each time."""
    work, h = weight.double().numpy().copy(), moment.double().numpy().copy()
    mask, width = work == 0, len(h)
    h[np.arange(width), np.arange(width)] += 0.01 * h.diagonal().mean()
    order = np.argsort(-moment.diagonal().numpy(), kind="stable") if act_order else np.arange(width)
    static = plain(weight, bits, group).double().numpy()
    codes, left, span = np.zeros(work.shape, np.int64), list(order), width if bits == 8 else group
    grid = {}
    for j in order:
        inverse = np.linalg.inv(h[np.ix_(left, left)])  # the first of these is j
        g = j // span
        if g not in grid:
            now = torch.from_numpy(np.where(mask, 0, work)[:, g * span : (g + 1) * span]).float()
            grid[g] = static[g] if act_order or bits == 8 else plain(now, bits, span)[0].double().numpy()
        scale, zero = grid[g].T
        wanted = np.where(mask[:, j], 0, work[:, j])
        level = np.rint((wanted - zero) / scale).clip(-(2 ** (bits - 1)) + (bits == 8), 2 ** (bits - 1) - 1)
        codes[:, j] = level + 2 ** (bits - 1)
        error = work[:, j] - (level * scale + zero)
        for place, k in enumerate(left[1:], 1):
            work[:, k] -= error * inverse[0, place] / inverse[0, 0]
        left = left[1:]
    return codes


def test_by_hand() -> None:
    """Both weights are 0.4 on a grid of whole numbers: the second takes over 0.9 of the error of the first and is rounded up."""
    moment = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    policy = GPTQ(bits=4, damp=0.0001, act_order=True)  # on the grid that it is given
    codes, _ = policy.codes(torch.tensor([[0.4, 0.4]]), torch.tensor([[[1.0, 0.0]]]).bfloat16(), 4, seen(moment))
    assert codes.tolist() == [[8, 9]]
    rounded, upward = torch.tensor([[-0.4, -0.4]]), torch.tensor([[-0.4, 0.6]])
    assert float(output_error(rounded, moment)) == pytest.approx(0.16 + 0.16 + 2 * 0.9 * 0.16)
    assert float(output_error(upward, moment)) == pytest.approx(0.16 + 0.36 - 2 * 0.9 * 0.24)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(("bits", "group"), SHAPES)
def test_the_codes_are_those_of_the_plain_sweep(bits: int, group: int, pruned: bool, act_order: bool) -> None:
    weight, moment = problem()
    if pruned:
        weight = weight * (torch.rand(weight.shape) > 0.5)
    policy = GPTQ(bits=bits, act_order=act_order)
    codes, grid = policy.codes(weight, plain(weight, bits, group), bits, seen(moment))
    np.testing.assert_array_equal(codes.numpy(), reference(weight, moment, bits, group, act_order))
    stored = values(codes, grid, bits)
    nearest = values(packing.encode(weight, plain(weight, bits, group), bits), plain(weight, bits, group), bits)
    assert float(output_error(stored - weight, moment).sum()) < float(output_error(nearest - weight, moment).sum())
    assert not stored[weight == 0].any()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group"), SHAPES)
def test_on_inputs_that_do_not_correlate_it_is_round_to_nearest(bits: int, group: int, act_order: bool) -> None:
    weight, moment = problem(correlated=False)
    grid = plain(weight, bits, group)
    codes, mine = GPTQ(bits=bits, act_order=act_order).codes(weight, grid, bits, seen(moment))
    assert torch.equal(mine, grid)
    assert torch.equal(codes, packing.encode(weight, grid, bits))


def test_where_nothing_was_seen_it_is_round_to_nearest() -> None:
    weight, moment = problem()
    grid = plain(weight, 4, 32)
    for spot in (Spot("map"), seen(torch.zeros_like(moment))):
        codes, mine = GPTQ(bits=4).codes(weight, grid, 4, spot)
        assert torch.equal(codes, packing.encode(weight, grid, 4))
        assert torch.equal(mine, grid)


def test_an_input_that_is_always_zero_takes_no_part() -> None:
    weight, moment = problem()
    moment[5], moment[:, 5] = 0, 0
    grid = plain(weight, 4, 32)
    codes, _ = GPTQ(bits=4, act_order=True).codes(weight, grid, 4, seen(moment))
    assert torch.equal(codes[:, 5], packing.encode(weight, grid, 4)[:, 5])
    rest = [j for j in range(64) if j != 5]
    assert not torch.equal(codes[:, rest], packing.encode(weight, grid, 4)[:, rest])


@pytest.mark.parametrize(("bits", "act_order"), [(2, False), (3, False), (4, False), (4, True), (8, False)])
def test_every_map_of_a_model_loses_no_more_than_by_rounding(bits: int, act_order: bool) -> None:
    session, errors = make_session(), []
    for policy in (RoundToNearest(bits=bits, head="same"), GPTQ(bits=bits, head="same", act_order=act_order)):
        names = targets(session, policy)
        moments = {n: s.moment for _, group in gathered(session, names, frozenset({"moment"}), 8) for n, s in group.items()}
        before = {n: matrix_of(session.model.get_submodule(n)).detach() for n in names}
        with attached(session, policy):
            after = {n: matrix_of(session.model.get_submodule(n)) for n in names}
            errors.append({n: float(output_error(after[n] - before[n], moments[n]).sum()) for n in names})  # type: ignore[arg-type]
    rounding, mine = errors
    assert len(mine) == 15
    assert all(mine[n] < rounding[n] for n in mine)


def test_bytes_are_those_of_round_to_nearest_and_a_mask_survives() -> None:
    session = make_session()
    for bits in (3, 4, 8):
        held = []
        for policy in (RoundToNearest(bits=bits), GPTQ(bits=bits)):
            with attached(session, policy):
                held.append(weight_bytes(session))
        assert held[0] == held[1]
    with attached(session, Magnitude(sparsity=0.5)):
        masked = weight_metrics(session)["zero_weights"]
    with attached(session, Magnitude(sparsity=0.5), GPTQ(head="keep")):
        assert weight_metrics(session)["zero_weights"] >= masked  # what rounds to zero comes on top


def test_more_damping_brings_it_nearer_to_rounding() -> None:
    weight, moment = problem()
    grid = plain(weight, 4, 32)
    nearest = packing.encode(weight, grid, 4)
    moved = []
    for damp in (0.001, 0.1, 1.0):
        codes, _ = GPTQ(damp=damp, act_order=True).codes(weight, grid, 4, seen(moment))
        moved.append(int((codes != nearest).sum()))
    assert all(a > b for a, b in pairwise(moved))


def test_experts_are_rounded_one_by_one() -> None:
    session = make_session(tiny.moe_folder())
    with attached(session, GPTQ(bits=8)):
        assert weight_metrics(session)["replaced_modules"] == 2 * (4 + 8 * 2) + 1
