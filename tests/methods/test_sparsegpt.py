"""SparseGPT against its algorithm done column by column in float64, with an explicit inverse of what is left each time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from studio_state.errors import StudioError
from tests import tiny
from tests.methods.driving import attached, make_session
from workers.mechanisms.calibration import gathered
from workers.mechanisms.inverse_moment import damped, inverse_factor, sweep
from workers.mechanisms.weight_places import places
from workers.mechanisms.weight_policy import weight_bytes, weight_metrics
from workers.policies.prune.magnitude import prune
from workers.policies.prune.sparsegpt import SparseGPT
from workers.policies.prune.wanda import Wanda
from workers.policies.quantize.rtn import RoundToNearest

N, K = 12, 160  # more than one block of 128 inputs


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own for each test."""
    monkeypatch.setenv("PARETO_STUDIO_CACHE", str(tmp_path))


def matrices(seed: int = 0, width: int = K) -> tuple[Tensor, Tensor]:
    """Weights, and the moment of inputs that correlate."""
    pen = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * width, width, generator=pen) @ torch.randn(width, width, generator=pen) / width**0.5
    x += torch.randn(width, generator=pen)
    return torch.randn(N, width, generator=pen), x.T @ x / len(x)


def error(change: Tensor, moment: Tensor) -> float:
    """Mean square by which the output moves."""
    return float(torch.einsum("nk,kl,nl->", change.double(), moment.double(), change.double()))


# -- the inverse moment --------------------------------------------------------------------
def test_the_factor_squares_to_the_inverse_and_its_rows_are_those_of_what_is_left() -> None:
    _, moment = matrices()
    factor = inverse_factor(moment, 0.01).double()
    work = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(K)
    assert torch.equal(factor, factor.triu())
    inverse = torch.linalg.inv(work)
    assert float((factor.T @ factor - inverse).norm() / inverse.norm()) < 1e-4
    for j in (0, 1, 77, K - 1):
        left = torch.linalg.inv(work[j:, j:])
        assert float(factor[j, j]) == pytest.approx(float(left[0, 0].sqrt()), rel=1e-4)
        assert torch.allclose(factor[j, j:] / factor[j, j], left[0] / left[0, 0], rtol=1e-3, atol=1e-4)


def test_inputs_that_are_always_zero_neither_give_nor_take() -> None:
    _, moment = matrices()
    dead = [3, 130]
    moment[dead] = moment[:, dead] = 0
    live = [j for j in range(K) if j not in dead]
    factor = inverse_factor(moment)
    assert torch.allclose(factor[live][:, live], inverse_factor(moment[live][:, live]), rtol=1e-3, atol=1e-4)
    for j in dead:
        assert factor[j].nonzero().flatten().tolist() == [j]
        assert factor[:, j].nonzero().flatten().tolist() == [j]
    assert torch.allclose(damped(torch.zeros(3, 3), 0.5), 1.5 * torch.eye(3))


def test_a_moment_that_float32_cannot_factor_is_factored_in_float64() -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # three directions of forty
    moment = x.T @ x
    assert torch.linalg.cholesky_ex(damped(moment.float(), 1e-8).flip(0, 1))[1] > 0
    factor, work = inverse_factor(moment, 1e-8).double(), damped(moment, 1e-8)
    assert torch.allclose(factor @ work @ factor.T, torch.eye(40, dtype=torch.float64), atol=1e-2)


def test_moments_without_an_inverse_are_told_in_a_sentence() -> None:
    with pytest.raises(StudioError, match=r"fewer dimensions than its 4.* damp = 0.0; raise damp, or samples"):
        inverse_factor(torch.ones(4, 4), 0.0)
    with pytest.raises(StudioError, match="not a number during calibration; use dtype float32"):
        inverse_factor(torch.full((4, 4), torch.nan))


@pytest.mark.parametrize("block", [1, 7, 32, 200])
def test_blocks_of_the_sweep_change_no_number(block: int) -> None:
    weight, moment = matrices()
    factor = inverse_factor(moment)
    done = sweep(weight, factor, lambda j, columns: columns[:, 0].round(), block)
    whole = sweep(weight, factor, lambda j, columns: columns[:, 0].round(), K)
    assert torch.equal(done, done.round())
    assert (done != whole).float().mean() < 0.01  # a number at the edge of two integers may fall to either side


# -- the method ----------------------------------------------------------------------------
def test_two_weights_by_hand() -> None:
    """Pruning the first of two: the second takes over what it predicts of it, M01 / M11."""
    moment = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    pruned = SparseGPT(sparsity=0.5, damp=0.0001).pruned(torch.tensor([[1.0, 3.0]]), moment)
    assert pruned[0, 0] == 0
    assert float(pruned[0, 1]) == pytest.approx(3 + 1 / 4, abs=1e-3)


def reference(weight: Tensor, moment: Tensor, sparsity: float, of: int, damp: float) -> Tensor:
    """The paper's algorithm with explicit inverses, float64. ``of``: 0 = unstructured, else half of so many neighbours go."""
    w, m = weight.double().clone(), moment.double() + damp * moment.double().diagonal().mean() * torch.eye(len(moment))
    power = torch.stack([torch.linalg.inv(m[j:, j:])[0, 0] for j in range(len(m))])
    gone = torch.zeros_like(w, dtype=torch.bool)
    for j in range(len(m)):
        if of and j % of == 0:
            for n in range(len(w)):
                scores = w[n, j : j + of] ** 2 / power[j : j + of]
                gone[n, j + scores.argsort()[: of // 2]] = True
        elif not of and j % 128 == 0:
            scores = (w[:, j : j + 128] ** 2 / power[j : j + 128]).flatten()
            chosen = torch.zeros_like(scores, dtype=torch.bool)
            chosen[scores.argsort()[: int(sparsity * len(scores))]] = True
            gone[:, j : j + 128] = chosen.view(len(w), -1)
        left = torch.linalg.inv(m[j:, j:])
        loss = torch.where(gone[:, j], w[:, j], 0.0) / left[0, 0]
        w[:, j:] -= loss[:, None] * left[0]
        w[:, j] = w[:, j].masked_fill(gone[:, j], 0)
    return w


@pytest.mark.parametrize(("pattern", "of"), [("unstructured", 0), ("2:4", 4), ("4:8", 8)])
def test_it_is_the_algorithm_of_the_paper(pattern: str, of: int) -> None:
    weight, moment = matrices()
    mine = SparseGPT(pattern=pattern, sparsity=0.6, damp=0.01).pruned(weight, moment)
    theirs = reference(weight, moment, 0.6, of, 0.01)
    assert torch.equal(mine == 0, theirs == 0)
    assert torch.allclose(mine.double(), theirs, rtol=1e-3, atol=1e-3)


def test_exactly_the_share_goes_in_every_block() -> None:
    weight, moment = matrices()
    pruned = SparseGPT(sparsity=0.37).pruned(weight, moment)
    assert [int((pruned[:, a:b] == 0).sum()) for a, b in ((0, 128), (128, K))] == [int(0.37 * N * 128), int(0.37 * N * 32)]
    groups = (SparseGPT(pattern="2:4").pruned(weight, moment) == 0).reshape(-1, 4).sum(1)
    assert bool((groups == 2).all())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_output_moves_less_than_with_wanda_and_with_magnitude(seed: int, pattern: str) -> None:
    weight, moment = matrices(seed)
    mine = error(SparseGPT(pattern=pattern).pruned(weight, moment) - weight, moment)
    by_wanda = error(Wanda(pattern=pattern).pruned(weight, moment) - weight, moment)
    by_size = error((prune(weight, 0.5, by_row=True) if pattern == "unstructured" else Wanda(pattern=pattern).pruned(weight, None)) - weight, moment)  # fmt: skip
    assert mine <= by_wanda
    assert mine <= by_size


def test_inputs_that_do_not_correlate_leave_the_others_alone() -> None:
    weight, _ = matrices()
    moment = torch.diag(torch.linspace(0.5, 2, K))
    pruned = SparseGPT(sparsity=0.5).pruned(weight, moment)
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])


def test_of_dead_inputs_the_weights_go_first() -> None:
    weight, moment = matrices()
    moment[5] = moment[:, 5] = 0
    pruned = SparseGPT(sparsity=0.1).pruned(weight, moment)
    assert bool((pruned[:, 5] == 0).all())
    assert int((pruned[:, :128] == 0).sum()) == int(0.1 * N * 128)


def test_in_a_model_it_goes_by_what_each_map_is_given() -> None:
    session = make_session()
    names, bare = places(session).linears, weight_bytes(session)
    seen = {n: s for _, group in gathered(session, names, frozenset({"moment"}), 8) for n, s in group.items()}
    originals = {n: session.model.get_submodule(n).weight for n in names}
    with attached(session, SparseGPT()):
        for name in names:
            wanted = SparseGPT().pruned(originals[name], seen[name].moment)
            assert torch.equal(session.model.get_submodule(name).weight, wanted)
        metrics = weight_metrics(session)
        assert (metrics["weight_bytes"], metrics["replaced_modules"], metrics["zero_weights"]) == (bare, 14, 0.5)
        masks = {n: session.model.get_submodule(n).weight == 0 for n in names}
    with attached(session, SparseGPT(), RoundToNearest(bits=4)):
        assert all((session.model.get_submodule(n).matrix()[mask] == 0).all() for n, mask in masks.items())


def test_experts_one_by_one() -> None:
    session = make_session(tiny.moe_folder())
    with attached(session, SparseGPT(pattern="2:4", samples=1)):
        assert weight_metrics(session)["zero_weights"] == 0.5
