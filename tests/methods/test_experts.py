"""Mixtures of experts: found, seen without a trace, and counted as the library's own router logits say."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from studio_state.errors import Unavailable
from studio_state.events import ExpertLoad as LoadEvent
from studio_state.events import decode
from tests import tiny
from tests.methods.driving import attached, forced, generate, make_session, prompt, tokens
from workers.families.batches import make_batch
from workers.mechanisms.expert_load import counting_experts, entropy
from workers.mechanisms.experts import MoEBlock, RouterCall, blocks, known_blocks, leaving_out, routed
from workers.policies.depth.layer_skip import LayerSkip
from workers.session import Session
from workers.telling import expert_load_event
from workers.workloads.base import Item

KINDS = ("mixtral", "qwen3_moe", "olmoe", "qwen2_moe")
every_kind = pytest.mark.parametrize("kind", KINDS)


def moe_session(kind: str = "mixtral", **changes: Any) -> Session:
    return make_session(tiny.moe_folder(kind, **changes))


def library_visits(session: Session, ids: Sequence[int], top_k: int = 2) -> np.ndarray[Any, Any]:
    """Visits [layers, 8] of one forward of the library over these ids, from its router logits, by sorting."""
    out = session.model(torch.tensor([ids]), output_router_logits=True, use_cache=False)
    counts = np.zeros((len(out.router_logits), 8), dtype=int)
    for layer, logits in enumerate(out.router_logits):
        for row in logits.reshape(-1, 8).detach().numpy():
            counts[layer, np.argsort(-row)[:top_k]] += 1
    return counts


@every_kind
def test_blocks_are_found_with_what_the_library_does_not_say(kind: str) -> None:
    session = moe_session(kind, num_hidden_layers=3)
    assert blocks(session) == tuple(
        MoEBlock(i, f"model.layers.{i}.mlp.gate", f"model.layers.{i}.mlp.experts", 8, 2) for i in range(3)
    )


def test_dense_layers_between_are_passed_over() -> None:
    session = moe_session("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1])
    assert [b.layer for b in blocks(session)] == [0, 2]
    (table,) = generate(session, [prompt(20)], new=2).experts
    assert [len(row) for row in table] == [8, 0, 8]


@every_kind
def test_looking_on_changes_no_bit_and_leaves_no_trace(kind: str) -> None:
    session, calls = moe_session(kind), []
    before = forced(session, prompt(40), prompt(8, seed=1))
    own = {n: sorted(vars(m)) for n, m in session.model.named_modules()}
    with routed(session, calls.append):
        assert torch.equal(forced(session, prompt(40), prompt(8, seed=1)), before)
    assert {n: sorted(vars(m)) for n, m in session.model.named_modules()} == own
    assert torch.equal(forced(session, prompt(40), prompt(8, seed=1)), before)
    assert [(c.block.layer, len(c.indices)) for c in calls] == [(0, 40), (1, 40), (0, 7), (1, 7)]
    call: RouterCall = calls[0]
    assert (tuple(call.hidden.shape), tuple(call.logits.shape)) == ((40, 64), (40, 8))
    shares = call.logits.double().softmax(-1)
    chosen = shares.gather(1, call.indices)
    if kind in ("mixtral", "qwen3_moe"):
        chosen = chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(call.weights.double(), chosen, rtol=1e-5, atol=1e-6)


@every_kind
def test_the_load_is_what_the_librarys_router_logits_say(kind: str) -> None:
    session = moe_session(kind)
    given = prompt(50)
    trace = generate(session, [given], new=9)
    expected = library_visits(session, [*given, *tokens(trace)[0][:-1]])  # nobody reads the last token
    (table,) = trace.experts
    assert np.array_equal(np.array(table), expected / (2 * 58))
    shares = expected / expected.sum(1, keepdims=True)
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    assert trace.counts["expert_load_entropy"] == pytest.approx(-(shares * logs).sum(1).mean() / math.log(8))
    assert trace.counts["experts_used"] == (expected > 0).sum(1).mean()
    assert trace.counts["expert_top_k"] == 2


@pytest.mark.parametrize("chunk", [None, 7])
def test_padding_is_not_counted_and_every_row_has_its_own_table(chunk: int | None) -> None:
    session = make_session(tiny.moe_folder(), batch=2, chunk_size=chunk)
    prompts = [prompt(40), prompt(23, seed=2)]
    trace = generate(session, prompts, new=4)
    for given, new, table in zip(prompts, tokens(trace), trace.experts, strict=True):
        expected = library_visits(session, [*given, *new[:-1]])
        assert np.array_equal(np.array(table), expected / expected.sum(1, keepdims=True))
    assert trace.counts["expert_top_k"] == 2


class Operations(TorchDispatchMode):
    """Names of all operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("prompts", [[prompt(20)], [prompt(20), prompt(9)]])
def test_counting_never_waits_for_the_device(prompts: list[list[int]]) -> None:
    """None of its operations hands a number from the device to Python; all of them are queued."""
    session, batch = make_session(tiny.moe_folder(), batch=2), make_batch(prompts, 0, torch.device("cpu"))
    with counting_experts(session, len(prompts)) as load:
        count, operations = load.see, Operations()

        def watched(call: RouterCall) -> None:
            with operations:
                count(call)

    with torch.inference_mode(), routed(session, watched):
        state = session.family.prefill(session, batch)
        session.family.step(session, state, torch.ones(len(prompts), 1, dtype=torch.long))
    assert load.metrics()["expert_top_k"] == 2
    queued = {"add", "arange", "bitwise_not", "expand", "expand_as", "flatten", "masked_fill", "mul", "ne", "reshape"}
    queued |= {"scatter_add_", "sum", "unsqueeze"}
    assert "scatter_add_" in operations.names
    assert operations.names <= queued


def test_layers_that_did_not_run_are_not_in_the_means() -> None:
    session = moe_session()
    with attached(session, LayerSkip(start=0.0, count=1)):
        trace = generate(session, [prompt(30)], new=3)
    first, second = trace.experts[0]
    assert sum(first) == 0
    assert trace.counts["experts_used"] == sum(share > 0 for share in second)
    assert trace.counts["expert_top_k"] == 2


def test_evenness() -> None:
    assert entropy([5, 5, 5, 5]) == pytest.approx(1)
    assert entropy([7, 0, 0]) == 0
    assert entropy([1, 1, 0, 0]) == pytest.approx(0.5)
    assert entropy([9]) == 1


def test_who_comes_later_sees_what_those_before_decided() -> None:
    session, seen = moe_session(), []

    def first_only(call: RouterCall) -> None:
        call.indices, call.weights = call.indices[:, :1], call.weights[:, :1]

    with routed(session, first_only), routed(session, lambda call: seen.append(call.indices.shape[1])):
        trace = generate(session, [prompt(20)], new=3)
    assert set(seen) == {1}
    assert trace.counts["expert_top_k"] == 1


@every_kind
def test_a_visit_that_is_left_out_is_worth_nothing_and_not_counted(kind: str) -> None:
    """Marking visits gives what the library gives for weights of zero, without the work for them."""
    session, worked = moe_session(kind), []
    every_third = torch.arange(200) % 3 == 0

    def unweigh(call: RouterCall) -> None:
        call.weights = call.weights.clone()
        call.weights[every_third[: len(call.weights)], 1] = 0

    def mark(call: RouterCall) -> None:
        unweigh(call)
        call.indices = call.indices.masked_fill(call.weights == 0, call.count)

    with routed(session, unweigh):
        expected = forced(session, prompt(40), prompt(8, seed=1))
    with routed(session, mark), leaving_out(session):
        got = forced(session, prompt(40), prompt(8, seed=1))
        trace = generate(session, [prompt(40)], new=3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    gone = 14 + 2  # tokens 0, 3, .. 39 of the prompt, and each of two decoded tokens
    assert trace.counts["expert_top_k"] == pytest.approx((2 * 42 - gone) / 42)
    session = with_model(session, copy.deepcopy(session.model))
    session.model.set_experts_implementation(noting(worked))
    with routed(session, mark), leaving_out(session):
        forced(session, prompt(40), prompt(2, seed=1))
    assert worked == [80 - 14, 80 - 14, 1, 1]


def noting(worked: list[int]) -> str:
    """Name of an experts function, registered with the library, that notes how many visits it works for."""

    def experts(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        worked.append(index.numel())
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden, index, weights)

    ALL_EXPERTS_FUNCTIONS.register("noting", experts)
    return "noting"


def test_a_run_that_is_given_up_leaves_no_trace() -> None:
    session = moe_session()
    own = {n: sorted(vars(m)) for n, m in session.model.named_modules()}
    trace = session.family.begin(session, [Item(id="a", prompt_ids=tuple(prompt(20)), max_new_tokens=8, ignore_eos=True)])
    steps = session.family.run(session, trace)
    next(steps)
    assert any("forward" in vars(m) for m in session.model.modules())
    del steps
    assert {n: sorted(vars(m)) for n, m in session.model.named_modules()} == own


def test_models_without_experts_are_not_counted_and_refused_in_words() -> None:
    session = make_session()
    trace = generate(session, [prompt(20)], new=3)
    assert trace.experts == []
    assert not [n for n in trace.counts if "expert" in n]
    with pytest.raises(Unavailable, match=r"\(LlamaForCausalLM\) has no mixture of experts that the studio knows; those of the"):
        known_blocks(session)


def test_a_mixture_of_another_shape_runs_uncounted() -> None:
    session = make_session(tiny.moe_folder("granitemoe", num_local_experts=8))
    assert "moe" in session.info.traits
    trace = generate(session, [prompt(20)], new=3)
    assert trace.experts == []
    with pytest.raises(Unavailable, match="GraniteMoeForCausalLM"):
        known_blocks(session)


def test_the_event_is_small_and_comes_back_from_its_line() -> None:
    event = expert_load_event(1, "a", [[1 / 3, 2 / 3], []])
    assert event.layers == [[0.3333, 0.6667], []]
    assert decode(event.line()) == event
    assert isinstance(decode(event.line()), LoadEvent)


def with_model(session: Session, model: Any) -> Session:
    """The same session on another model, with nothing built."""
    return replace(session, model=model, built={}, acted={}, counts={})


def three_experts() -> Session:
    """A mixture of three whose shares of a token [1, 0, ..] are 0.6, 0.3, 0.1 and whose outputs are 10, 20, 30 times it."""
    session = moe_session("mixtral", num_local_experts=3, hidden_act="linear")
    model = copy.deepcopy(session.model)
    with torch.no_grad():
        for layer in model.model.layers:
            router, experts = layer.mlp.gate, layer.mlp.experts
            for tensor in (router.weight, experts.gate_up_proj, experts.down_proj):
                tensor.zero_()
            router.weight[:, 0] = torch.tensor([0.6, 0.3, 0.1]).log()
            experts.gate_up_proj[:, 0, 0] = 1  # gate of the first neuron
            experts.gate_up_proj[:, 48, 0] = torch.tensor([1.0, 2.0, 3.0])  # its up
            experts.down_proj[:, 0, 0] = 10
    return with_model(session, model)


def first_output(session: Session) -> float:
    """What the first mixture makes of the token [1, 0, ..], first number."""
    token = torch.zeros(1, 1, 64)
    token[..., 0] = 1
    with torch.inference_mode():
        return float(session.model.model.layers[0].mlp(token)[0, 0, 0])


def test_three_experts_by_hand() -> None:
    assert first_output(three_experts()) == pytest.approx(2 / 3 * 10 + 1 / 3 * 20)
