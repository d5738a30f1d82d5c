"""TEAL against quantiles taken by sorting, and masks worked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import tiny
from tests.methods.driving import attached, forced, generate, make_session, prompt, tokens
from workers.mechanisms.calibration import Seen, gathered
from workers.mechanisms.expert_linears import ExpertLinears
from workers.mechanisms.sparse_inputs import SKIPPED
from workers.mechanisms.weight_places import places
from workers.mechanisms.weight_policy import Spot, weight_bytes, weight_metrics
from workers.policies.quantize.rtn import RoundToNearest
from workers.policies.runtime.lean_decode import LeanDecode
from workers.policies.sparsity.teal import TEAL, ThresholdInput, threshold


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own for each test."""
    monkeypatch.setenv("PARETO_STUDIO_CACHE", str(tmp_path))
    torch.manual_seed(0)


def wrap(source: nn.Module, keep: float, sample: torch.Tensor) -> ThresholdInput:
    seen = Seen(len(sample), sample.abs().mean(0), sample.abs().amax(0), None, sample, "m")
    made = TEAL(keep=keep).replacement(source, Spot("m", seen=seen))
    assert isinstance(made, ThresholdInput)
    return made


def test_a_small_map_by_hand() -> None:
    sample = torch.tensor([[0.1, -4.0, 3.0, 0.2], [1.0, -0.3, 2.0, 0.4]])  # sizes .1 .2 .3 .4 1 2 3 4
    assert threshold(sample, 0.5) == pytest.approx(0.4)
    assert threshold(sample, 0.25) == pytest.approx(2.0)
    assert threshold(sample, 1.0) < 0
    source = nn.Linear(4, 2, bias=False).requires_grad_(False)
    source.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]))
    one = wrap(source, 0.5, sample)
    x = torch.tensor([[0.5, -0.4, 0.3, -2.0]])  # the first and the last are larger than 0.4
    assert one.chosen(x).tolist() == [[True, False, False, True]]
    assert torch.allclose(one(x), torch.tensor([[-7.5, -13.5]]))
    assert torch.allclose(one(x.repeat(3, 1)), torch.tensor([[-7.5, -13.5]]).repeat(3, 1))


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.9])
def test_of_the_sample_exactly_the_share_stays(keep: float) -> None:
    sample = torch.randn(20, 30)
    one = wrap(nn.Linear(30, 10).requires_grad_(False), keep, sample)
    mask = one.chosen(sample)
    assert int(mask.sum()) == round(keep * 600)
    assert float(sample[mask].abs().min()) > float(sample[~mask].abs().max())


def test_all_none_and_many_inputs_of_one_row() -> None:
    source = nn.Linear(30, 10).requires_grad_(False)
    one = wrap(source, 0.5, torch.randn(20, 30))
    assert one.gathers
    for size in (0.0, 1e-3, 1.0, 100.0):
        x = torch.randn(1, 30) * size
        assert torch.allclose(one(x), F.linear(x * (x.abs() > one.threshold), source.weight, source.bias), atol=1e-4, rtol=1e-5)
    assert torch.equal(one(torch.zeros(1, 1, 30))[0, 0], source.bias)


def test_in_a_model_each_map_has_the_quantile_of_its_own_inputs() -> None:
    session, bare = make_session(), weight_bytes(make_session())
    names = places(session).linears
    seen = {n: s for _, group in gathered(session, names, frozenset({"sample"}), 8) for n, s in group.items()}
    given: dict[str, list[torch.Tensor]] = {n: [] for n in names}
    with attached(session, TEAL(keep=0.4, whole=0)):
        for name in names:
            one: Any = session.model.get_submodule(name)
            sizes = seen[name].sample.abs().flatten().sort().values  # type: ignore[union-attr]
            assert one.threshold == float(sizes[len(sizes) - round(0.4 * len(sizes)) - 1])
            one.register_forward_pre_hook(lambda m, args, n=name: given[n].append((args[0].abs() > m.threshold).flatten(0, -2)))
        assert weight_bytes(session) == bare
        assert weight_metrics(session)["scale_bytes"] == 0
        counted = generate(session, [prompt(40)], new=8).counts[SKIPPED]
    masks = {n: torch.cat(m) for n, m in given.items()}
    sizes_of = {n: session.model.get_submodule(n).weight.shape[0] for n in names}
    taken = sum(int(masks[n].sum()) * sizes_of[n] for n in names)
    needed = sum(masks[n].numel() * sizes_of[n] for n in names)
    assert counted == pytest.approx(1 - taken / needed)
    assert 0.4 < counted < 0.8


def test_maps_of_one_input_fuse_and_compute_the_same() -> None:
    session, ids, following = make_session(), prompt(40), prompt(8, seed=5)
    for before in ([], [RoundToNearest()]):
        with attached(session, *before, TEAL()):
            layer: Any = session.model.get_submodule("model.layers.0.self_attn")
            assert layer.q_proj.threshold == layer.k_proj.threshold == layer.v_proj.threshold
            wanted, said = forced(session, ids, following), tokens(generate(session, [ids]))
        with attached(session, *before, TEAL(), LeanDecode()):
            # before packed weights, sums that differ in the last bit may round to either side
            assert torch.allclose(forced(session, ids, following), wanted, atol=1e-3 if before else 1e-4)
            if not before:
                assert tokens(generate(session, [ids])) == said
            fused = {type(layer.get_submodule(n)).__name__ for n in ("q_proj", "k_proj", "v_proj")}
            assert fused == {"FusedPart"}


def test_neutral_knobs_give_the_same_bits() -> None:
    session = make_session()
    plain = forced(session, prompt(40), prompt(8, seed=5))
    with attached(session, TEAL(keep=1.0)):
        assert torch.equal(forced(session, prompt(40), prompt(8, seed=5)), plain)
    assert session.acted == {}


def test_experts_that_no_token_of_the_text_visits_stay_dense() -> None:
    session = make_session(tiny.moe_folder())
    name = places(session).experts[0]
    own = ExpertLinears.of(session.model.get_submodule(name))
    names = [f"{name}.{n}" for n in own.names()]
    with session.swapped({name: own}):
        seen = {n for _, found in gathered(session, names, frozenset({"sample"}), 1) for n in found}
    with attached(session, TEAL(samples=1)):
        made = {n for n in names if isinstance(session.model.get_submodule(n), ThresholdInput)}
        generate(session, [prompt(12)], new=4)
    assert made == seen
