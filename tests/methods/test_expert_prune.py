"""Expert pruning: ranked as an independent count ranks, equal to the library's smaller model, bytes exact."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from studio_state.errors import Unavailable
from studio_state.pipeline import parse_pipeline
from studio_state.problems import pipeline_problems
from tests import tiny
from tests.methods.driving import attached, forced, generate, make_session, prompt, tokens
from tests.methods.test_experts import every_kind, first_output, moe_session, three_experts, with_model
from workers.data.novels import held_out
from workers.mechanisms import attention
from workers.mechanisms.expert_load import counting_experts
from workers.mechanisms.expert_scores import WINDOW, calibration_windows, expert_scores
from workers.mechanisms.experts import MoEBlock, blocks, without_experts
from workers.mechanisms.linear import held_bytes
from workers.mechanisms.weight_policy import weight_bytes, weight_metrics
from workers.methods import catalogue
from workers.policies.prune.expert_prune import ExpertPrune, best
from workers.policies.prune.magnitude import Magnitude
from workers.session import Session

EXPERT = 3 * 64 * 48  # numbers of one expert: gate, up, down
GIVEN, FOLLOWING = prompt(4), prompt(4, seed=1)


def reference_scores(session: Session, kind: str, tokens: int) -> list[Tensor]:
    """Scores [8] of each layer from the library's router logits and plain matrix products, window by window."""
    layers = session.model.model.layers
    normalises = [getattr(x.mlp.gate, "norm_topk_prob", True) for x in layers]
    total = [torch.zeros(8, dtype=torch.float64) for _ in layers]
    visits = [torch.zeros(8, dtype=torch.float64) for _ in layers]
    inputs: dict[int, Tensor] = {}
    hooks = [x.mlp.register_forward_pre_hook(lambda m, args, i=i: inputs.update({i: args[0]})) for i, x in enumerate(layers)]
    ids = tiny.tokenizer().encode(held_out(), add_special_tokens=False)[:tokens]
    try:
        for start in range(0, tokens, 512):
            window = torch.tensor([ids[start : start + 512]])
            with torch.no_grad():
                logits = session.model(window, use_cache=False, output_router_logits=True).router_logits
            for i, layer in enumerate(layers):
                shares = logits[i].view(-1, 8).softmax(-1)
                for e in range(8):
                    among = (shares > shares[:, e : e + 1]).sum(1) < 2  # at most one expert is larger
                    x, p = inputs[i][0][among], shares[among]
                    weight = p[:, e] / p.topk(2).values.sum(1) if normalises[i] else p[:, e]
                    gate, up = F.linear(x, layer.mlp.experts.gate_up_proj[e]).chunk(2, -1)
                    size = F.linear(F.silu(gate) * up, layer.mlp.experts.down_proj[e]).norm(dim=1)
                    total[i][e] += {"frequency": among.sum(), "weight": weight.sum(), "output": (weight * size).sum()}[
                        kind
                    ].double()
                    visits[i][e] += among.sum()
    finally:
        for hook in hooks:
            hook.remove()
    return [t / n.clamp_min(1) for t, n in zip(total, visits, strict=True)] if kind == "output" else total


@pytest.mark.parametrize("score", ["frequency", "weight", "output"])
@every_kind
def test_scores_are_those_of_an_independent_count(kind: str, score: str) -> None:
    session = moe_session(kind)
    got = expert_scores(session, score, 700, "test")
    for block, expected in zip(blocks(session), reference_scores(session, score, 700), strict=True):
        torch.testing.assert_close(got[block], expected, rtol=1e-4, atol=1e-6)
        if score == "frequency":
            assert got[block].sum() == 2 * 700


def test_the_text_is_cut_to_the_context_and_to_what_there_is() -> None:
    session = moe_session()
    assert [len(w) for w in calibration_windows(session, 1100)] == [WINDOW, WINDOW, 76]
    short = moe_session("mixtral", max_position_embeddings=100)
    assert [len(w) for w in calibration_windows(short, 250)] == [100, 100, 50]


@every_kind
def test_equals_the_librarys_model_with_fewer_experts(kind: str) -> None:
    """A model made by the library with 4 experts, filled with the rows of those that were sent most tokens."""
    session = moe_session(kind)
    session = with_model(session, copy.deepcopy(session.model))  # a file's tensors lie at odd addresses, which rounds otherwise
    ranked = reference_scores(session, "frequency", 300)
    small = AutoModelForCausalLM.from_pretrained(tiny.moe_folder(kind)).config
    small.update({"num_local_experts" if kind == "mixtral" else "num_experts": 4})
    library = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    library.set_attn_implementation(attention.NAME)
    state = dict(session.model.state_dict())
    for i, scores in enumerate(ranked):
        stay = sorted(sorted(range(8), key=lambda e: (-float(scores[e]), e))[:4])
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            state[f"model.layers.{i}.mlp.{name}"] = state[f"model.layers.{i}.mlp.{name}"][stay]
    library.load_state_dict(state)
    with attached(session, ExpertPrune(keep=0.5, tokens=300)):
        got = forced(session, prompt(40), prompt(12, seed=1))
        new = tokens(generate(session, [prompt(20)], new=6))
    other = with_model(session, library)
    assert torch.equal(got, forced(other, prompt(40), prompt(12, seed=1)))
    assert new == tokens(generate(other, [prompt(20)], new=6))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_nobody_visits_are_not_missed(kind: str) -> None:
    """Where the weights are normalised, the logits of a text stay if exactly the experts that it visits do."""
    session = moe_session(kind)
    with counting_experts(session, 1) as load:
        before = forced(session, GIVEN, FOLLOWING)
    visited = {b: torch.tensor(load.tables()[0][b.layer]).nonzero()[:, 0] for b in blocks(session)}
    assert all(2 <= len(stay) < 8 for stay in visited.values())
    modules = without_experts(session, visited)
    with session.swapped(modules):
        torch.testing.assert_close(forced(session, GIVEN, FOLLOWING), before, rtol=1e-5, atol=2e-5)
    rest = {b: torch.tensor([e for e in range(8) if e not in stay.tolist()][:2]) for b, stay in visited.items()}
    with session.swapped(without_experts(session, rest)):
        assert not torch.allclose(forced(session, GIVEN, FOLLOWING), before, atol=0.1)


def test_three_experts_by_hand() -> None:
    session = three_experts()
    for stay, expected in (([1, 2], 0.75 * 20 + 0.25 * 30), ([0, 2], 6 / 7 * 10 + 1 / 7 * 30), ([2], 30), ([0, 1, 2], 40 / 3)):
        with session.swapped(without_experts(session, {b: torch.tensor(stay) for b in blocks(session)})):
            assert first_output(session) == pytest.approx(expected, rel=1e-5)


@every_kind
def test_keep_everything_is_the_baseline(kind: str) -> None:
    session = moe_session(kind)
    plain = forced(session, GIVEN, FOLLOWING)
    modules = list(session.model.modules())
    for keep in (1.0, 0.96):  # 0.96 of 8 rounds to 8
        with attached(session, ExpertPrune(keep=keep)):
            assert list(session.model.modules()) == modules
            assert torch.equal(forced(session, GIVEN, FOLLOWING), plain)
    assert session.acted == {}
    assert ExpertPrune(keep=0.96).why_idle(session) == "Expert pruning: keep = 0.96 leaves all experts of every layer; lower it"


@pytest.mark.parametrize(("keep", "left"), [(0.01, 1), (0.25, 2), (0.5, 4), (0.8, 6)])
def test_bytes_are_those_of_the_experts_that_are_left(keep: float, left: int) -> None:
    session = moe_session()
    bare, values = weight_bytes(session), {n: p.clone() for n, p in session.model.named_parameters()}
    with attached(session, ExpertPrune(keep=keep, tokens=64)):
        assert weight_metrics(session) == {
            "weight_bytes": bare - 4 * 2 * (8 - left) * (EXPERT + 64),  # float32, layers, experts gone, the router's row
            "replaced_modules": 0,
        }
        experts = session.model.model.layers[0].mlp.experts
        assert held_bytes([experts]) == 4 * left * EXPERT
        assert {p.untyped_storage().nbytes() for p in experts.parameters()} == {4 * left * 64 * 96, 4 * left * 64 * 48}
        trace = generate(session, [prompt(20)], new=3)
        assert trace.counts["expert_top_k"] == min(2, left)  # a token never visits more than there are
        assert trace.counts["experts_used"] <= left
    assert session.acted == {"expert-prune": 2 * (8 - left)}
    assert weight_bytes(session) == bare
    assert all(torch.equal(p, values[n]) for n, p in session.model.named_parameters())


def test_the_table_keeps_the_numbers_of_the_bare_model() -> None:
    session = moe_session()
    stay = {b: torch.tensor([1, 4, 6]) for b in blocks(session)}
    with session.swapped(without_experts(session, stay)):
        (table,) = generate(session, [prompt(30)], new=3).experts
    for layer in table:
        assert len(layer) == 8
        assert sum(layer) == pytest.approx(1)
        assert {e for e, share in enumerate(layer) if share} <= {1, 4, 6}


def test_of_equal_experts_the_first_stay() -> None:
    assert best(torch.tensor([3.0, 5.0, 3.0, 1.0]), 2).tolist() == [0, 1]
    assert best(torch.tensor([0.0, 0.0, 2.0]), 2).tolist() == [0, 2]


def test_built_once_and_anew_for_another_model_state() -> None:
    session, policy = moe_session(), ExpertPrune(tokens=64)

    def inside(*policies: Any) -> Any:
        with attached(session, *policies):
            return session.model.model.layers[0].mlp.experts

    alone = inside(policy)
    assert inside(policy) is alone
    assert inside(Magnitude(), policy) is not alone  # what the text calls on depends on the whole model
    assert inside(policy) is alone
    assert alone.config is session.model.config


def test_other_models_are_refused() -> None:
    dense = make_session()
    (problem,) = pipeline_problems(parse_pipeline("expert-prune"), catalogue(), dense.info)
    assert "Expert pruning needs a model with the trait 'moe'" in problem.message
    with pytest.raises(Unavailable, match="no mixture of experts that the studio knows"):
        ExpertPrune().attach(dense)


def test_blocks_are_those_of_the_bare_model() -> None:
    session = moe_session()
    with attached(session, ExpertPrune(keep=0.5, tokens=64)):
        assert {type(b) for b in blocks(session)} == {MoEBlock}
        assert [b.count for b in blocks(session)] == [8, 8]
        assert [session.model.get_submodule(b.router).num_experts for b in blocks(session)] == [4, 4]
