"""The race loop on a tiny model in a real folder: counts, order, equality; never time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from studio_state.events import (
    Event,
    Failed,
    Finished,
    ItemStarted,
    Kept,
    LaneFinished,
    Metric,
    ModelLoaded,
    Output,
    Ratio,
    Tokens,
)
from studio_state.experiment import ExperimentSpec
from studio_state.metrics import METRICS
from studio_state.pipeline import parse_pipeline
from workers.engine import run
from workers.export_model import Request, export
from workers.host import ModelHost

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 3


@pytest.fixture(scope="module")
def host() -> ModelHost:
    return ModelHost()


def race(host: ModelHost, model: Path | str, *lanes: str, workload: str = "prompts", **more: Any) -> list[Event]:
    options = more.pop("options", {"text": TEXT} if workload == "prompts" else {})
    defaults: dict[str, Any] = {"threads": 1, "max_new_tokens": 12, "eos": "ignore", "chat_template": False}
    spec = ExperimentSpec(
        model=str(model),
        workload={"id": workload, "options": options},  # type: ignore[arg-type]
        lanes=[parse_pipeline(x) for x in lanes],  # type: ignore[arg-type]
        **{**defaults, **more},
    )
    return list(run(spec, host))


def of(events: list[Event], kind: type[Any], **fields: Any) -> list[Any]:
    return [e for e in events if isinstance(e, kind) and all(getattr(e, k) == v for k, v in fields.items())]


def value(events: list[Event], lane: int, name: str) -> float:
    return of(events, Metric, lane=lane, name=name, item=None)[-1].value


def test_baseline_equals_the_librarys_own_generate(host: ModelHost, tiny_llama: Path) -> None:
    events = race(host, tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    streamed = [t for e in of(events, Tokens, lane=0) for t in e.ids]
    assert streamed == expected
    assert of(events, Output, lane=0)[0].data["token_ids"] == expected
    assert "".join(e.text for e in of(events, Tokens, lane=0)) == tokenizer.decode(expected, skip_special_tokens=True)
    assert isinstance(events[-1], Finished)


def test_event_order_and_names(host: ModelHost, tiny_llama: Path) -> None:
    events = race(host, tiny_llama, "snapkv:keep=0.5,window=4")
    kinds = [e.event for e in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert kinds.index("model") < kinds.index("lane") < kinds.index("item") < kinds.index("output")
    assert {e.name for e in of(events, Metric)} | {e.name for e in of(events, Ratio)} <= set(METRICS)
    assert [e.status for e in of(events, LaneFinished)] == ["finished", "finished"]
    assert all(e.flags == [] for e in of(events, LaneFinished))
    assert of(events, ModelLoaded)[0].info.family == "llm"


def test_kv_bytes_and_the_eviction_map_tell_the_truth(host: ModelHost, tiny_llama: Path) -> None:
    events = race(host, tiny_llama, "snapkv:keep=0.5,window=4")
    prompt = int(value(events, 0, "prompt_tokens"))
    kept = round(0.5 * prompt)
    per_token = 2 * 2 * 2 * 16 * 4  # layers x (K, V) x KV heads x head width x float32
    assert value(events, 0, "prefill_kv_bytes") == prompt * per_token
    assert value(events, 1, "prefill_kv_bytes") == kept * per_token
    assert value(events, 1, "kept_prompt_tokens") == kept
    assert value(events, 0, "kv_bytes") == (prompt + 11) * per_token  # the last new token is never fed back
    map_ = of(events, Kept, lane=1)[0]
    assert len(map_.share) == prompt
    assert sum(map_.share) == pytest.approx(kept, abs=0.05)
    assert map_.share[-4:] == [1, 1, 1, 1]
    assert not of(events, Kept, lane=0)
    ratio = of(events, Ratio, lane=1, name="prefill_kv_bytes")[0]
    assert ratio.value == pytest.approx(kept / prompt)


def test_the_baseline_agrees_with_itself(host: ModelHost, tiny_llama: Path) -> None:
    events = race(host, tiny_llama, "baseline", "snapkv:keep=1.0")
    for lane in (0, 1):
        assert value(events, lane, "kl_to_baseline") == pytest.approx(0, abs=1e-6)
        assert value(events, lane, "top1_agreement") == 1
        assert value(events, lane, "first_divergence") == 12
        assert value(events, lane, "same_output") == 1


def test_lanes_rotate_from_item_to_item(host: ModelHost, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("One prompt about rivers.\nAnother prompt about trees.\nA third one about letters.\n")
    events = race(host, tiny_llama, "snapkv:window=2", "knorm", options={"file": str(file), "items": 3})
    order = [e.lane for e in of(events, ItemStarted)]
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]


def test_likelihood_sees_a_cache_policy(host: ModelHost, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 6)
    options = {"file": str(file), "items": 2, "context": 128, "score": 32}
    events = race(host, tiny_llama, "snapkv:keep=0.2,window=4", workload="perplexity", options=options)
    assert value(events, 0, "perplexity") > 1
    assert value(events, 1, "perplexity") != value(events, 0, "perplexity")
    assert value(events, 1, "kl_to_baseline") > 0
    assert not of(events, Metric, name="first_divergence")


def test_perplexity_equals_one_forward_of_the_library(host: ModelHost, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 6)
    events = race(host, tiny_llama, workload="perplexity", options={"file": str(file), "items": 1, "context": 64, "score": 40})
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    prompt = of(events, ItemStarted)[0]
    assert len(prompt.pieces) == 64
    text = tokenizer(TEXT * 6, add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(text)) if tokenizer.decode(text[i : i + 64]) == prompt.prompt)
    ids = torch.tensor([text[start : start + 104]])
    with torch.inference_mode():
        logprobs = model(ids).logits.log_softmax(-1)[0, 63:-1]
    expected = -logprobs.gather(1, ids[0, 64:, None]).mean().exp().item()
    nll = -logprobs.gather(1, ids[0, 64:, None]).mean()
    assert value(events, 0, "perplexity") == pytest.approx(nll.exp().item(), rel=1e-4), expected


def test_a_batch_with_padding_equals_single_runs(host: ModelHost, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Short one.\n" + TEXT.strip() + "\nA third prompt, of middle length, about rivers and trees.\n")
    options = {"file": str(file), "items": 3}
    single = {e.item: e.data["token_ids"] for e in of(race(host, tiny_llama, options=options), Output)}
    together = {e.item: e.data["token_ids"] for e in of(race(host, tiny_llama, options=options, batch=3), Output)}
    assert together == single


@pytest.mark.parametrize("more", [{"chunk_size": 7}, {"attention": "eager"}])
def test_chunks_and_kernels_give_the_same_tokens(host: ModelHost, tiny_llama: Path, more: dict[str, Any]) -> None:
    plain, other = (of(race(host, tiny_llama, **kw), Output)[0].data["token_ids"] for kw in ({}, more))
    assert plain == other


def test_no_effect_is_flagged(host: ModelHost, tiny_llama: Path) -> None:
    events = race(host, tiny_llama, "snapkv:keep=0.9,window=32", options={"text": "Hi there"})
    done = of(events, LaneFinished, lane=1)[0]
    assert done.status == "finished"
    assert done.flags
    assert done.flags[0].startswith("no effect: ")


def test_sampling_is_the_same_in_equal_lanes(host: ModelHost, tiny_llama: Path) -> None:
    sampling = {"temperature": 0.9, "top_k": 50, "top_p": 0.95}
    events = race(host, tiny_llama, "snapkv:keep=1.0", sampling=sampling, seed=5)
    a, b = (of(events, Output, lane=lane)[0].data["token_ids"] for lane in (0, 1))
    assert a == b
    other = race(host, tiny_llama, sampling=sampling, seed=6)
    assert of(other, Output)[0].data["token_ids"] != a


def test_all_problems_come_at_once(host: ModelHost, tiny_llama: Path) -> None:
    events = race(host, tiny_llama, "snapkv:keep=7+h2o", "nothing-known")
    failed = of(events, Failed)[0]
    assert len(failed.problems) == 3
    assert isinstance(events[-1], Failed)
    assert {p["policy"] for p in failed.problems} == {"snapkv", "h2o", "nothing-known"}


def test_cancel_stops_between_steps(host: ModelHost, tiny_llama: Path) -> None:
    spec = ExperimentSpec(
        model=str(tiny_llama), workload={"id": "prompts", "options": {"text": TEXT}}, threads=1, max_new_tokens=500
    )  # type: ignore[arg-type]
    seen: list[Event] = []
    for event in run(spec, host, is_cancelled=lambda: any(isinstance(e, Tokens) for e in seen)):
        seen.append(event)
    assert seen[-1].event == "cancelled"
    assert 0 < sum(len(e.ids) for e in of(seen, Tokens)) < 500


def test_a_prompt_over_the_context_is_refused_in_one_sentence(host: ModelHost, tiny_llama: Path) -> None:
    events = race(host, tiny_llama, options={"text": "word " * 5000})
    assert isinstance(events[-1], Failed)
    assert "context" in events[-1].message
    assert "\n" not in events[-1].message


def test_a_model_that_fits_only_compressed_still_runs(host: ModelHost, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = race(host, tiny_llama, "rtn:bits=8", options={"text": TEXT, "items": 1})
    estimate = of(whole, ModelLoaded)[0].estimate
    monkeypatch.setenv("PARETO_STUDIO_MEMORY_LIMIT", str(estimate.total - estimate.weight_bytes // 4))
    events = race(host, tiny_llama, "rtn:bits=8", "magnitude", options={"text": TEXT, "items": 1})
    status = {e.lane: e for e in of(events, LaneFinished)}
    assert [status[i].status for i in range(3)] == ["unavailable", "finished", "unavailable"]
    assert status[0].message.startswith("no baseline on this device")
    assert not status[1].interleaved
    assert not of(events, Ratio)
    assert of(events, Output, lane=1)[0].data["token_ids"] == of(whole, Output, lane=1)[0].data["token_ids"]
    assert value(events, 1, "weight_bytes") == value(whole, 1, "weight_bytes") < value(whole, 0, "weight_bytes")


def test_policies_that_need_the_whole_model_are_unavailable_where_it_fits_only_compressed(
    host: ModelHost, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = race(host, tiny_llama, "rtn:bits=8", options={"text": TEXT, "items": 1})
    estimate = of(whole, ModelLoaded)[0].estimate
    monkeypatch.setenv("PARETO_STUDIO_MEMORY_LIMIT", str(estimate.total - estimate.weight_bytes // 4))
    events = race(host, tiny_llama, "gptq:bits=4", "rtn:bits=8", options={"text": TEXT, "items": 1})
    status = {e.lane: e for e in of(events, LaneFinished)}
    assert [status[i].status for i in range(3)] == ["unavailable", "unavailable", "finished"]
    assert "gptq looks at what goes into the maps of the whole model" in status[1].message
    alone = race(host, tiny_llama, "gptq:bits=4", options={"text": TEXT, "items": 1})
    assert isinstance(alone[-1], Failed)
    assert "so it cannot pack one while it loads" in alone[-1].message


def test_an_exported_model_is_its_own_baseline(host: ModelHost, tiny_llama: Path, tmp_path: Path) -> None:
    lanes = race(host, tiny_llama, "rtn:bits=4", options={"text": TEXT, "items": 1})
    export(Request(model=str(tiny_llama), pipeline=parse_pipeline("rtn:bits=4"), out=tmp_path / "packed"))
    events = race(host, tmp_path / "packed", "snapkv:window=4", options={"text": TEXT, "items": 1})
    assert isinstance(events[-1], Finished), events[-1]
    assert of(events, Output, lane=0)[0].data["token_ids"] == of(lanes, Output, lane=1)[0].data["token_ids"]
    for name in ("weight_bytes", "theoretical_weight_bytes", "scale_bytes", "padding_bytes", "replaced_modules"):
        assert value(events, 0, name) == value(lanes, 1, name)
    estimate = of(events, ModelLoaded)[0].estimate
    assert estimate.weight_bytes == pytest.approx(value(events, 0, "weight_bytes"), rel=0.01)
    refused = race(host, tmp_path / "packed", "rtn:bits=8")
    assert isinstance(refused[-1], Failed)
    assert "are packed already (rtn:bits=4 of llama)" in refused[-1].message


def test_lanes_that_do_not_fit_together_run_in_blocks(host: ModelHost, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = race(host, tiny_llama, "rtn:bits=8", "knorm")
    estimate = of(together, ModelLoaded)[0].estimate
    monkeypatch.setenv("PARETO_STUDIO_MEMORY_LIMIT", str(estimate.total + estimate.weight_bytes // 8))
    blocks = race(host, tiny_llama, "rtn:bits=8", "knorm")
    assert [e.interleaved for e in of(together, LaneFinished)] == [True, True, True]
    assert [e.interleaved for e in of(blocks, LaneFinished)] == [False, False, False]
    for lane in range(3):
        for name in ("kl_to_baseline", "same_output", "weight_bytes", "kv_bytes"):
            assert value(blocks, lane, name) == pytest.approx(value(together, lane, name), abs=1e-6)
    assert all(e.low is None for e in of(blocks, Ratio, name="decode_tokens_per_s"))
