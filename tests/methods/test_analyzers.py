"""Analyzers: operations held against PyTorch's own counter and exact tensor sums; times that add up; nothing stays."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from tests import tiny
from tests.methods.driving import attached, make_session, prompt
from workers.analyzers.llm_viewer import LLMViewer
from workers.analyzers.runtime_dissection import RuntimeDissection
from workers.mechanisms.operator_times import KINDS, kind_of
from workers.mechanisms.phases import NEW_TOKENS, ShortRun
from workers.mechanisms.step_work import counting
from workers.methods import Policy
from workers.policies.kv.streamingllm import StreamingLLM
from workers.policies.quantize.rtn import RoundToNearest
from workers.policies.runtime.lean_decode import LeanDecode
from workers.workloads.base import Item

LENGTH = 40


def short_run(session: Any, *policies: Policy) -> ShortRun:
    @contextmanager
    def attach(wanted: Any) -> Any:
        with attached(session, *filter(wanted, policies)):
            yield

    return ShortRun(session, attach, [Item(id="x", prompt_ids=tuple(prompt(LENGTH)))])


@pytest.mark.parametrize("folder", [tiny.llama_folder, tiny.qwen3_folder, tiny.gpt2_folder])
def test_operations_are_those_that_pytorch_counts(folder: Any) -> None:
    session = make_session(folder(), attention="eager")  # the counter knows no fused attention of a CPU
    run = short_run(session)
    for phase in ("prefill", "decode"):
        with run.ready(), counting(session) as counted:
            counter = FlopCounterMode(display=False)

            def around(work: Any, counter: Any = counter, counted: Any = counted) -> None:
                counted.take()
                with counter:
                    work()

            run.each(phase, around)
            mine = sum(w.flops for w in counted.take())
        theirs = counter.get_total_flops()
        assert mine == pytest.approx(theirs, rel=0.02)  # rotary frequencies are a small product of their own


def test_a_visit_to_an_expert_is_three_products_and_only_visited_experts_are_read() -> None:
    session = make_session(tiny.moe_folder())
    data, config = LLMViewer().analyze(short_run(session)), session.model.config
    expert = 3 * config.hidden_size * config.intermediate_size
    for phase, tokens_ in (("prefill", LENGTH), ("decode", 1)):
        (found,) = (o for o in data["phases"][phase]["operations"] if o["name"] == "experts")
        assert found["flops"] == 2 * tokens_ * config.num_experts_per_tok * expert * config.num_hidden_layers
    assert found["weight_bytes"] == 4 * config.num_experts_per_tok * expert * config.num_hidden_layers


def test_bytes_are_exact_tensor_sums() -> None:
    session = make_session()
    data = LLMViewer().analyze(short_run(session))
    operations = {o["name"]: o for o in data["phases"]["decode"]["operations"]}
    linears = 4 * sum(p.numel() for n, p in session.model.named_parameters() if n.endswith("proj.weight"))
    assert sum(o["weight_bytes"] for n, o in operations.items() if n.endswith("_proj")) == linears
    assert operations["head"]["weight_bytes"] == 4 * tiny.VOCAB * 64
    stored = [LENGTH + 1 + i for i in range(NEW_TOKENS - 1)]  # entries after each step
    per_token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes
    assert operations["attention"]["kv_bytes"] == pytest.approx(per_token * sum(stored) / len(stored))
    assert {o["bound"] for o in operations.values()} == {"memory"}


def test_packed_weights_and_cut_caches_move_fewer_bytes() -> None:
    session = make_session()
    plain, packed, cut = (
        LLMViewer().analyze(short_run(session, *policies))["phases"]["decode"]["operations"]
        for policies in ((), (RoundToNearest(bits=4), LeanDecode()), (StreamingLLM(keep=0.25),))
    )

    def moved(operations: Any, what: str) -> float:
        return sum(o[what] for o in operations)

    assert moved(packed, "weight_bytes") < 0.35 * moved(plain, "weight_bytes")
    assert moved(packed, "kv_bytes") == moved(plain, "kv_bytes")
    assert moved(cut, "kv_bytes") < 0.6 * moved(plain, "kv_bytes")
    assert moved(cut, "weight_bytes") == moved(plain, "weight_bytes")


def test_times_of_all_kinds_add_up_to_the_step_and_nothing_stays() -> None:
    session = make_session()
    before = {n: dict(vars(type(m))).get("forward") for n, m in session.model.named_modules()}
    for policies in ((), (RoundToNearest(bits=3), LeanDecode())):
        data = RuntimeDissection(repeats=1).analyze(short_run(session, *policies))
        for phase in ("prefill", "decode"):
            one = data["phases"][phase]
            assert set(one["kinds"]) == set(KINDS)
            assert sum(one["kinds"].values()) == pytest.approx(one["seconds"])
            assert one["steps"] == (1 if phase == "prefill" else NEW_TOKENS - 1)
            assert (one["kinds"]["unpacking"] > 0) == bool(policies)
            assert one["kinds"]["products"] > 0
    assert before == {n: dict(vars(type(m))).get("forward") for n, m in session.model.named_modules()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in session.model.modules())
    assert not session.observers


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "products"),
        ("aten::addmm", "products"),
        ("mkldnn::_linear_pointwise", "products"),
        ("aten::_weight_int4pack_mm_for_cpu", "products"),
        ("quantized::linear_dynamic", "products"),
        ("aten::mkldnn_convolution", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::copy_", "moving"),
        ("aten::cat", "moving"),
        ("aten::mul", "elementwise"),
        ("aten::add_", "elementwise"),
        ("aten::silu", "elementwise"),
        ("aten::rsqrt", "elementwise"),
    ],
)
def test_kinds_of_operators(name: str, kind: str) -> None:
    assert kind_of(name) == kind
