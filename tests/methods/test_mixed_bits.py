"""Mixed bits: the allocation against all allocations, the costs against the inputs themselves, the budget, and equal widths."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from studio_state.errors import SpecError
from tests import tiny
from tests.methods.driving import attached, make_session
from tests.methods.test_awq import loud
from workers.mechanisms.linear import Replacement, matrix_of
from workers.mechanisms.output_error import rounded
from workers.mechanisms.packed_linear import BitPlaneLinear, Int4Linear, Int8Linear
from workers.mechanisms.weight_policy import replacements, targets, weight_bytes, weight_metrics
from workers.policies.quantize import mixed_bits
from workers.policies.quantize.mixed_bits import MixedBits, allocate
from workers.policies.quantize.rtn import RoundToNearest


def everything(sizes: list[int], costs: list[list[float]], widths: list[int], average: float) -> float:
    """The least sum of costs of all allocations within the budget."""
    return min(
        sum(c[i] for c, i in zip(costs, choice, strict=True))
        for choice in product(range(len(widths)), repeat=len(sizes))
        if sum(n * widths[i] for n, i in zip(sizes, choice, strict=True)) <= average * sum(sizes) + 1e-9
    )


@pytest.mark.parametrize("average", [2.0, 2.7, 3.3, 4.0, 5.5, 8.0])
@pytest.mark.parametrize("seed", range(4))
def test_no_allocation_of_the_budget_costs_less(seed: int, average: float) -> None:
    pen = np.random.default_rng(seed)
    sizes, widths = [96, 32, 288, 32, 160], [2, 3, 4, 6, 8]
    costs = [list(pen.lognormal(0, 2) * 4.0 ** -np.arange(5) * pen.uniform(0.5, 1.5, 5)) for _ in sizes]
    chosen = allocate(sizes, costs, widths, average)
    assert sum(n * widths[i] for n, i in zip(sizes, chosen, strict=True)) <= average * sum(sizes)
    assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) == pytest.approx(everything(sizes, costs, widths, average))


def test_by_hand() -> None:
    """Two of equal size at 3 bits on average: the one that suffers more gets 4; where both suffer alike, 3 each."""
    widths = [2, 3, 4]
    assert allocate([10, 10], [[9.0, 4.0, 1.0], [2.0, 1.0, 0.5]], widths, 3.0) == [2, 0]
    assert allocate([10, 10], [[4.0, 1.0, 0.5], [4.0, 1.0, 0.5]], widths, 3.0) == [1, 1]
    assert allocate([10, 10], [[4.0, 1.0, 1.0], [4.0, 1.0, 1.0]], widths, 4.0) == [1, 1]  # more bits that help nothing are left
    assert allocate([30, 10], [[9.0, 4.0, 1.0], [9.0, 4.0, 1.0]], widths, 2.5) == [0, 2]  # 20 bits to spare: the small one, twice
    assert allocate([], [], widths, 3.0) == []


def test_a_budget_in_coarse_units_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_bits, "UNITS", 200)
    pen = np.random.default_rng(0)
    sizes, widths = [int(n) for n in pen.integers(1001, 5000, 6)], [2, 3, 4, 8]
    costs = [list(pen.lognormal(0, 2) * 4.0 ** -np.arange(4)) for _ in sizes]
    chosen = allocate(sizes, costs, widths, 4.1)
    assert sum(n * widths[i] for n, i in zip(sizes, chosen, strict=True)) <= 4.1 * sum(sizes)
    spent, least = sum(c[i] for c, i in zip(costs, chosen, strict=True)), everything(sizes, costs, widths, 4.1)
    assert least <= spent <= everything(sizes, costs, widths, 4.0)


def test_costs_are_shares_of_the_outputs_mean_square() -> None:
    weight, x = loud()
    mine = MixedBits().costs(weight, x.T @ x / len(x), [2, 4, 8])
    for bits, cost in zip([2, 4, 8], mine, strict=True):
        change = (rounded(weight, bits, 32) - weight).double() @ x.double().T
        assert cost == pytest.approx(float((change**2).sum() / ((weight.double() @ x.double().T) ** 2).sum()), rel=1e-4)
    assert mine[0] > mine[1] > mine[2] > 0
    alike = MixedBits().costs(weight, None, [4])
    assert alike[0] == pytest.approx(float((rounded(weight, 4, 32) - weight).square().sum() / weight.square().sum()), rel=1e-4)
    assert MixedBits().costs(torch.zeros(4, 64), None, [2, 4]) == [0.0, 0.0]


@pytest.mark.parametrize("average", [2.5, 3.0, 4.0, 6.3])
def test_the_average_stays_within_the_budget_and_every_map_has_its_bits(average: float) -> None:
    session, policy = make_session(), MixedBits(bits=average, head="keep")
    plan = policy.plan(session, targets(session, policy))
    new = replacements(session, policy)
    assert {n: m.bits for n, m in new.items() if isinstance(m, Replacement)} == plan
    sizes = {n: matrix_of(session.model.get_submodule(n)).numel() for n in plan}
    mean = sum(sizes[n] * b for n, b in plan.items()) / sum(sizes.values())
    assert average - 0.4 < mean <= average
    assert average.is_integer() or len(set(plan.values())) > 1  # random maps are all alike
    with attached(session, policy):
        assert weight_metrics(session)["mean_bits"] == pytest.approx(mean)
        kinds = {4: Int4Linear, 8: Int8Linear}
        assert all(type(new[n]) is kinds.get(b, BitPlaneLinear) for n, b in plan.items())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_equal_widths_are_round_to_nearest(bits: int) -> None:
    session, found = make_session(), []
    for policy in (RoundToNearest(bits=bits), MixedBits(bits=bits, low=bits, high=bits)):
        names = targets(session, policy)
        with attached(session, policy):
            found.append(([matrix_of(session.model.get_submodule(n)) for n in names], weight_bytes(session)))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1]


def test_the_widths_of_the_plan_are_told_and_cost_less_than_one_for_all() -> None:
    session, said = make_session(), []
    session.say = lambda text, done: said.append(text)
    policy = MixedBits(bits=4.0, head="same")
    names = targets(session, policy)
    plan = policy.plan(session, names)
    assert said[-1] == "Mixed bits: of 15 maps " + ", ".join(
        f"{list(plan.values()).count(b)} in {b} bits" for b in sorted(set(plan.values()))
    )
    assert list(plan) == names
    assert "lm_head" in plan


@pytest.mark.parametrize("knobs", [{"bits": 3.0, "low": 4}, {"bits": 7.5, "high": 6}, {"bits": 4.0, "low": 6, "high": 3}])
def test_an_average_outside_of_its_widths_is_refused_in_one_sentence(knobs: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=r"mixed-bits: bits = \S+ is the average of widths from low = \d to high = \d and cannot"):
        replacements(make_session(), MixedBits(**knobs))  # type: ignore[arg-type]


def test_groups_that_do_not_divide_are_refused_and_rows_take_any_width() -> None:
    session = make_session(tiny.moe_folder())
    with pytest.raises(SpecError, match=r"group_size = 32 does not divide the width 48 of .*down_proj"):
        replacements(session, MixedBits())
    with attached(session, MixedBits(bits=8, low=8)):
        assert weight_metrics(session)["mean_bits"] == 8


def test_a_head_alone_is_left_to_its_own_format() -> None:
    session = make_session()
    with attached(session, MixedBits(modules="lm_head")):
        assert weight_metrics(session)["mean_bits"] == 8
