"""Wanda against a matrix worked by hand, a sort of every row, and pruning by magnitude where all inputs are alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from studio_state.errors import SpecError
from tests import tiny
from tests.methods.driving import attached, forced, make_session, prompt
from workers.mechanisms.calibration import Seen, gathered
from workers.mechanisms.expert_linears import ExpertLinears
from workers.mechanisms.linear import DenseLinear, matrix_of
from workers.mechanisms.weight_places import places
from workers.mechanisms.weight_policy import Spot, weight_bytes, weight_metrics
from workers.policies.prune.magnitude import Magnitude, prune
from workers.policies.prune.wanda import Wanda
from workers.policies.quantize.rtn import RoundToNearest


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own for each test."""
    monkeypatch.setenv("PARETO_STUDIO_CACHE", str(tmp_path))


def test_a_small_matrix_by_hand() -> None:
    weight = torch.tensor([[4.0, -1.0, 2.0, 3.0], [-1.0, 5.0, 1.0, 2.0]])
    moment = torch.diag(torch.tensor([1.0, 36.0, 4.0, 1.0]))  # norms 1, 6, 2, 1: scores 4 6 4 3 and 1 30 2 2
    assert Wanda(sparsity=0.5).pruned(weight, moment).tolist() == [[0.0, -1.0, 2.0, 0.0], [0.0, 5.0, 0.0, 2.0]]
    assert Wanda(sparsity=0.25).pruned(weight, moment).tolist() == [[4.0, -1.0, 2.0, 0.0], [0.0, 5.0, 1.0, 2.0]]
    assert Wanda(pattern="2:4").pruned(weight, moment).tolist() == Wanda(sparsity=0.5).pruned(weight, moment).tolist()
    assert Wanda(sparsity=0.5).pruned(weight, None).tolist() == [[4.0, 0.0, 0.0, 3.0], [0.0, 5.0, 0.0, 2.0]]  # by magnitude


def matrices() -> tuple[Tensor, Tensor]:
    pen = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=pen) * torch.rand(64, generator=pen).exp()
    return torch.randn(24, 64, generator=pen), x.T @ x / 200


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.83, 0.99])
def test_in_each_row_exactly_the_lowest_scores_go(sparsity: float) -> None:
    weight, moment = matrices()
    pruned = Wanda(sparsity=sparsity).pruned(weight, moment)
    scores = weight.double().abs().numpy() * np.sqrt(moment.double().diagonal().numpy())
    for row, score in zip(pruned.numpy(), scores, strict=True):
        gone = np.argsort(score, kind="stable")[: int(sparsity * 64)]
        assert set(np.flatnonzero(row == 0)) == set(gone)
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])


@pytest.mark.parametrize(("pattern", "of"), [("2:4", 4), ("4:8", 8)])
def test_patterns_leave_half_of_every_group_the_better_half(pattern: str, of: int) -> None:
    weight, moment = matrices()
    pruned = Wanda(pattern=pattern, sparsity=0.1).pruned(weight, moment)  # the pattern says how many
    scores = (weight.double().abs() * moment.double().diagonal().sqrt()).reshape(-1, of)
    stay = (pruned != 0).reshape(-1, of)
    assert bool((stay.sum(1) == of // 2).all())
    assert bool((scores.masked_fill(~stay, torch.inf).amin(1) >= scores.masked_fill(stay, 0).amax(1)).all())


def test_where_all_inputs_are_alike_it_is_magnitude_by_row() -> None:
    weight, _ = matrices()
    alike = 3.0 * torch.eye(64) + 0.5 * (1 - torch.eye(64))
    assert torch.equal(Wanda(sparsity=0.6).pruned(weight, alike), prune(weight, 0.6, by_row=True))


def test_in_a_model_it_goes_by_what_each_map_is_given() -> None:
    session = make_session()
    names, head, before = places(session).linears, session.model.lm_head, forced(session, prompt(40), prompt(8, seed=5))
    bare, originals = weight_bytes(session), {n: session.model.get_submodule(n).weight.clone() for n in names}
    seen = {n: s for _, group in gathered(session, names, frozenset({"moment"}), 8) for n, s in group.items()}
    with attached(session, Wanda(sparsity=0.5)):
        assert session.model.lm_head is head
        for name in names:
            moment = seen[name].moment
            assert moment is not None
            scores = originals[name].abs() * moment.diagonal().sqrt()
            left = scores.argsort(dim=1, stable=True)[:, scores.shape[1] // 2 :]
            wanted = torch.zeros_like(scores).scatter(1, left, originals[name].gather(1, left))
            assert torch.equal(session.model.get_submodule(name).weight, wanted)
        metrics = weight_metrics(session)
        assert (metrics["weight_bytes"], metrics["replaced_modules"], metrics["zero_weights"]) == (bare, 14, 0.5)
        assert not torch.equal(forced(session, prompt(40), prompt(8, seed=5)), before)
    assert all(torch.equal(session.model.get_submodule(n).weight, originals[n]) for n in names)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_mask_survives_rounding(bits: int) -> None:
    session = make_session()
    with attached(session, Wanda(pattern="2:4")):
        masks = {n: session.model.get_submodule(n).weight == 0 for n in places(session).linears}
    with attached(session, Wanda(pattern="2:4"), RoundToNearest(bits=bits)):
        assert all((session.model.get_submodule(n).matrix()[mask] == 0).all() for n, mask in masks.items())
        assert weight_metrics(session)["zero_weights"] >= 0.5


def test_a_width_that_the_pattern_does_not_divide_is_refused() -> None:
    with pytest.raises(SpecError, match=r"wanda: pattern = 4:8 needs widths that 8 divides, and some.map has 12 inputs; take"):
        Wanda(pattern="4:8").replacement(nn.Linear(12, 4).requires_grad_(False), Spot("some.map"))


def test_the_number_format_of_the_model_stays() -> None:
    source = nn.Linear(16, 4).bfloat16().requires_grad_(False)
    spot = Spot("m", seen=Seen(9, torch.ones(16), torch.ones(16), torch.eye(16), None, "m"))
    once = Wanda().replacement(source, spot)
    twice = Wanda(sparsity=0.75).replacement(once, spot)  # type: ignore[arg-type]
    assert isinstance(twice, DenseLinear)
    assert twice.weight.dtype == torch.bfloat16
    assert twice.zeros == 4 * 12


def test_experts_that_no_token_visits_are_pruned_by_magnitude() -> None:
    session = make_session(tiny.moe_folder())
    name = places(session).experts[0]
    own = ExpertLinears.of(session.model.get_submodule(name))
    names = [f"{name}.{n}" for n in own.names()]
    with session.swapped({name: own}):
        seen = {n: s for _, group in gathered(session, names, frozenset({"moment"}), 1) for n, s in group.items()}
    with attached(session, Wanda(sparsity=0.5, samples=1)):
        for one in names:
            weight = matrix_of(own.get_submodule(one.removeprefix(f"{name}.")))
            norms = seen[one].moment.diagonal().sqrt() if one in seen else torch.ones(weight.shape[1])  # type: ignore[union-attr]
            left = (weight.abs() * norms).argsort(dim=1, stable=True)[:, weight.shape[1] // 2 :]
            wanted = torch.zeros_like(weight).scatter(1, left, weight.gather(1, left))
            assert torch.equal(session.model.get_submodule(one).weight, wanted)


def test_neutral_knobs_replace_nothing() -> None:
    session = make_session()
    with attached(session, Wanda(sparsity=0.0)):
        assert weight_metrics(session)["replaced_modules"] == 0
    assert session.acted == {}
    assert not Magnitude(sparsity=0.5).is_neutral
    assert not Wanda(sparsity=0.0, pattern="2:4").is_neutral
