"""Analyzers: operations held against PyTorch's own counter and exact tensor sums; times that add up; nothing stays."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from studio_state.decoder_costs import Bits, Decoder, operations
from studio_state.metrics import METRICS
from tests import tiny, tiny_vision
from tests.methods.drawing import LABEL, OWN, drawing_session
from tests.methods.driving import attached, image_item, make_session, prompt, seeing_session
from workers.analyzer import Analyzer
from workers.analyzers.llm_viewer import LLMViewer
from workers.analyzers.roofline_order import RooflineOrder
from workers.analyzers.runtime_dissection import RuntimeDissection
from workers.mechanisms.operator_times import KINDS, kind_of
from workers.mechanisms.phases import NEW_TOKENS, ShortRun
from workers.mechanisms.step_work import counting
from workers.meters.device_profile import device_profile
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


def of_item(session: Any, item: Item) -> ShortRun:
    return replace(short_run(session), items=[item])


def held_against_pytorch(session: Any, run: ShortRun) -> dict[str, tuple[float, float]]:
    """Phase -> our operations and PyTorch's, whose counter knows no fused attention of a CPU."""
    found = {}
    for phase in run.phases:
        with run.ready(), counting(session) as counted:
            counter = FlopCounterMode(display=False)

            def around(work: Any, counter: Any = counter, counted: Any = counted) -> None:
                counted.take()
                with counter, sdpa_kernel(SDPBackend.MATH):
                    work()

            run.each(phase, around)
            found[phase] = (sum(w.flops for w in counted.take()), float(counter.get_total_flops()))
    return found


@pytest.mark.parametrize("folder", [tiny.llama_folder, tiny.qwen3_folder, tiny.gpt2_folder])
def test_operations_of_a_language_model_are_those_that_pytorch_counts(folder: Any) -> None:
    session = make_session(folder(), attention="eager")
    for mine, theirs in held_against_pytorch(session, short_run(session)).values():
        assert mine == pytest.approx(theirs, rel=0.02)  # rotary frequencies are a small product of their own


@pytest.mark.parametrize(
    ("folder", "task"),
    [
        (tiny_vision.vit_folder, "classify"),
        (tiny_vision.dinov2_folder, "classify"),
        (tiny_vision.clip_vision_folder, "classify"),
        (tiny_vision.llava_folder, "generate"),
    ],
)
def test_operations_of_a_model_that_sees_are_those_that_pytorch_counts(folder: Any, task: str) -> None:
    session = seeing_session(folder(), "fashion" if task == "classify" else "vqa", attention="eager")
    for mine, theirs in held_against_pytorch(session, of_item(session, image_item(task))).values():
        assert mine == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("folder", [tiny_vision.vit_folder, tiny_vision.dinov2_folder])
def test_a_pass_reads_every_map_of_an_encoder_once(folder: Any) -> None:
    session = seeing_session(folder(), "fashion")
    found = LLMViewer().analyze(of_item(session, image_item("classify")))["phases"]["pass"]["operations"]
    maps = [m for m in session.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert sum(o["weight_bytes"] for o in found) == 4 * sum(p.numel() for m in maps for p in m.parameters())


@pytest.mark.parametrize("kind", [OWN, "dit", "stable-diffusion"])
def test_operations_of_a_drawing_are_those_that_pytorch_counts(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    session = drawing_session(kind, tmp_path_factory.getbasetemp())
    data = {"steps": 2, "guidance": 3.0, "size": 0, "label": LABEL, "seed": 5}
    run = of_item(session, Item(id="x", task="draw", chat=False, prompt="a red boat", data=data))
    assert run.phases == ("pass",)
    ((mine, theirs),) = held_against_pytorch(session, run).values()
    assert mine == theirs
    roof = LLMViewer().analyze(run)["phases"]["pass"]
    assert {"maps", "attention"} == set(roof["seconds"])


def shape_of(session: Any) -> Decoder:
    config = session.model.config
    return Decoder(
        layers=config.num_hidden_layers, hidden=config.hidden_size, ffn=config.intermediate_size, heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads, vocab=config.vocab_size,
    )  # fmt: skip


def test_operations_and_bytes_by_shape_alone_are_those_that_are_counted() -> None:
    """Maps, head and cache; attention that is not fused has its scores on top, which a fused one never writes."""
    session = make_session()
    shape = shape_of(session)
    phases = LLMViewer().analyze(short_run(session))["phases"]
    prefill = {o.work.name: o for o in operations(shape, "prefill", LENGTH, 1, Bits(32, 32, 32))}
    for counted in phases["prefill"]["operations"]:
        if counted["name"] == "attention":
            asked, read = prefill["queries with keys"], prefill["scores with values"]
            assert counted["flops"] == asked.times * (asked.work.flops + read.work.flops)
            assert counted["kv_bytes"] == asked.times * (asked.work.kv_bytes + read.work.kv_bytes)
            continue
        derived = prefill[counted["name"]]
        assert counted["flops"] == derived.times * derived.work.flops
        assert counted["weight_bytes"] == derived.times * derived.work.weight_bytes
        moved = derived.work.activation_bytes + derived.work.kv_bytes  # what is cached is an output like any other
        assert counted["activation_bytes"] == derived.times * moved


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
    # two operations for the four bytes of each weight or entry, twice that where two heads share an entry
    for o in operations.values():
        assert o["flops"] == o["weight_bytes"] / 2 + o["kv_bytes"]


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


def taken(analyzer: Analyzer, data: Any) -> dict[str, tuple[float, ...]]:
    found = {m.name: m.values for m in analyzer.metrics(data)}
    assert set(found) <= set(METRICS)
    return found


def test_metrics_of_the_dissection_are_shares_and_lean_blocks_have_no_layers() -> None:
    session, analyzer = make_session(), RuntimeDissection(repeats=2)
    data = analyzer.analyze(short_run(session))
    found = taken(analyzer, data)
    assert set(found) == {"products_share", "layers_share", "prefill_products_share", "prefill_layers_share"}
    assert all(len(v) == 2 and min(v) > 0 and max(v) <= 1 for v in found.values())
    lean = taken(analyzer, analyzer.analyze(short_run(session, LeanDecode())))
    assert "layers_share" not in lean
    assert lean["products_share"]


def test_metrics_of_the_roofline_by_hand() -> None:
    def part(seconds: float, bound: str) -> dict[str, Any]:
        return {"seconds": seconds, "bound": bound}

    data = {
        "phases": {
            "prefill": {"operations": [part(3.0, "compute"), part(1.0, "memory")]},
            "decode": {"operations": [part(2.0, "memory")]},
        }
    }
    assert taken(LLMViewer(), data) == {
        "roofline_prefill_s": (4.0,),
        "prefill_memory_bound_share": (0.25,),
        "roofline_decode_s": (2.0,),
        "memory_bound_share": (1.0,),
    }


def test_the_order_that_the_roofline_predicts_by_hand() -> None:
    settings = [{"predicted": p, "seconds": s} for p, s in ((1.0, [2.0, 8.0]), (2.0, [4.0, 4.0]), (4.0, [5.0, 3.0]))]
    assert taken(RooflineOrder(), {"settings": settings}) == {"roofline_order": (1.0, -1.0), "roofline_reached": (0.8, 4 / 3)}


def test_six_settings_are_predicted_as_the_roofline_analyzer_counts_them() -> None:
    session = make_session()
    data = RooflineOrder(short=4, long=LENGTH, timed=2).analyze(short_run(session))
    assert [(s["batch"], s["length"], len(s["seconds"])) for s in data["settings"]] == [
        (b, n, 2) for b in (1, 4, 16) for n in (4, LENGTH)
    ]
    predicted = {(s["batch"], s["length"]): s["predicted"] for s in data["settings"]}
    assert all(predicted[b, LENGTH] > predicted[b, 4] for b in (1, 4, 16))
    device = device_profile(session.device)
    maps = [o for o in operations(shape_of(session), "decode", LENGTH + 1, 16, Bits(32, 32, 32)) if o.work.group == "maps"]
    assert predicted[16, LENGTH] > sum(o.times * o.work.bytes for o in maps) / device.bandwidth * 0.99


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
