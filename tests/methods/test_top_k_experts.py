"""Fewer experts a token: against the library's model of that setting, by hand, and against a loop over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from studio_state.errors import SpecError, Unavailable
from studio_state.pipeline import parse_pipeline
from studio_state.problems import pipeline_problems
from tests import tiny
from tests.methods.driving import attached, forced, generate, load, make_session, prompt, tokens
from tests.methods.test_experts import every_kind, first_output, moe_session, three_experts, with_model
from workers.mechanisms.experts import blocks, routed
from workers.methods import catalogue
from workers.policies.prune.expert_prune import ExpertPrune
from workers.policies.sparsity.top_k_experts import TopKExperts

NORMALISED = ("mixtral", "qwen3_moe")


def scores(session: Any, *policies: Any) -> Tensor:
    with attached(session, *policies):
        return forced(session, prompt(40), prompt(12, seed=1))


@pytest.mark.parametrize(("top_k", "renormalise"), [(1, True), (1, False), (2, True), (3, False)])
@every_kind
def test_equals_the_librarys_model_with_that_setting(kind: str, top_k: int, renormalise: bool) -> None:
    """A model that normalises does so at any setting; one that does not keeps the weights as they are."""
    if (kind in NORMALISED) != renormalise:
        return
    many = {"num_experts_per_tok": 4, "num_hidden_layers": 3}
    session = moe_session(kind, **many)
    library = with_model(session, load(tiny.moe_folder(kind, **{**many, "num_experts_per_tok": top_k})))
    assert library.model.model.layers[0].mlp.gate.top_k == top_k
    expected, got = scores(library), scores(session, TopKExperts(top_k=top_k, renormalise=renormalise))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    if not renormalise:
        assert torch.equal(got, expected)
    with attached(session, TopKExperts(top_k=top_k, renormalise=renormalise)):
        trace = generate(session, [prompt(20)], new=5)
    assert trace.counts["expert_top_k"] == top_k
    assert tokens(trace) == tokens(generate(library, [prompt(20)], new=5))


@every_kind
def test_the_models_own_number_is_the_baseline(kind: str) -> None:
    session = moe_session(kind)
    plain = scores(session)
    for knobs in ({"top_k": 0}, {"top_k": 2}, {"top_k": 2, "renormalise": False}):
        assert torch.equal(scores(session, TopKExperts(**knobs)), plain)
    assert session.acted == {}
    assert "left no visit out; the model's tokens visit 2 experts" in TopKExperts(top_k=2).why_idle(session)


def test_three_experts_by_hand() -> None:
    session = three_experts()
    for knobs, expected in (
        ({"top_k": 1}, 10),
        ({"top_k": 1, "renormalise": False}, 2 / 3 * 10),
        ({"top_k": 0, "threshold": 0.49}, 2 / 3 * 10 + 1 / 3 * 20),  # 0.3 is not below 0.49 of 0.6
        ({"top_k": 0, "threshold": 0.51}, 10),
        ({"top_k": 0, "threshold": 0.51, "renormalise": False}, 2 / 3 * 10),
        ({"top_k": 2, "threshold": 0.51}, 10),
    ):
        with attached(session, TopKExperts(**knobs)):
            assert first_output(session) == pytest.approx(expected), knobs


def by_hand(session: Any, layer: int, hidden: Tensor, threshold: float, keep_sum: bool) -> tuple[Tensor, int]:
    """One mixture of one layer, token by token, from the weights alone; and the visits made."""
    mixture = session.model.model.layers[layer].mlp
    normalises = getattr(mixture.gate, "norm_topk_prob", True)
    out, visits = torch.zeros_like(hidden), 0
    for t, x in enumerate(hidden):
        shares = torch.exp(mixture.gate.weight @ x)
        ranked = sorted(((float(p), e) for e, p in enumerate(shares / shares.sum())), reverse=True)[: mixture.gate.top_k]
        total = sum(p for p, _ in ranked)
        ranked = [(p / total if normalises else p, e) for p, e in ranked]
        stay = [(p, e) for p, e in ranked if p >= threshold * ranked[0][0]]
        scale = sum(p for p, _ in ranked) / sum(p for p, _ in stay) if keep_sum else 1.0
        for p, e in stay:
            gate, up = (mixture.experts.gate_up_proj[e] @ x).chunk(2)
            out[t] += scale * p * (mixture.experts.down_proj[e] @ (gate * torch.sigmoid(gate) * up))
            visits += 1
    return out, visits


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
@torch.inference_mode()
def test_skipping_equals_a_loop_over_tokens(kind: str, renormalise: bool) -> None:
    session, calls = moe_session(kind, num_experts_per_tok=3), []
    policy = TopKExperts(top_k=0, threshold=0.6, renormalise=renormalise)
    visits = 0
    with attached(session, policy), routed(session, calls.append):
        generate(session, [prompt(30)], new=1)
        counts = [int((c.indices < 8).sum()) for c in calls]
        for call in calls:
            expected, made = by_hand(session, call.block.layer, call.hidden, 0.6, renormalise)
            got = session.model.get_submodule(call.block.experts)(call.hidden, call.indices, call.weights)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            visits += made
    assert len(calls) == 2
    assert 60 < visits < 180
    assert sum(counts) == visits
    assert session.acted == {"top-k-experts": 180 - visits}


@every_kind
def test_threshold_one_leaves_only_the_first(kind: str) -> None:
    session = moe_session(kind)
    with attached(session, TopKExperts(top_k=0, threshold=1.0)):
        assert generate(session, [prompt(20)], new=3).counts["expert_top_k"] == 1
    torch.testing.assert_close(
        scores(session, TopKExperts(top_k=0, threshold=1.0)), scores(session, TopKExperts(top_k=1)), rtol=1e-5, atol=2e-5
    )


def test_more_than_the_model_visits_is_refused() -> None:
    with pytest.raises(SpecError, match=r"top_k = 3, but tokens of .* visit 2 experts; choose at most 2, or 0"):
        TopKExperts(top_k=3).attach(moe_session())


def test_other_models_are_refused() -> None:
    dense = make_session()
    (problem,) = pipeline_problems(parse_pipeline("top-k-experts"), catalogue(), dense.info)
    assert "Fewer experts a token needs a model with the trait 'moe'" in problem.message
    with pytest.raises(Unavailable, match="no mixture of experts that the studio knows"):
        TopKExperts().attach(dense)


def test_after_pruning_it_chooses_among_those_that_are_left() -> None:
    session = moe_session()
    with attached(session, ExpertPrune(keep=0.25), TopKExperts(top_k=0, threshold=1.0)):
        trace = generate(session, [prompt(30)], new=3)
    assert trace.counts["expert_top_k"] == 1
    assert all(sum(share > 0 for share in layer) <= 2 for layer in trace.experts[0])
    assert len(blocks(session)) == 2
