"""A draft model's weights and cache count in the estimate before a run: exact bytes, and what follows where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from app.models import memory_rows
from studio_state.events import LaneFinished, ModelLoaded, Note
from studio_state.experiment import ExperimentSpec, MemoryEstimate
from studio_state.pipeline import parse_pipeline
from tests import tiny
from tests.worker.test_engine import of, race, value
from workers import plan
from workers.host import ModelHost
from workers.methods import discover, effective
from workers.models.fit import LIMIT_VARIABLE
from workers.models.info import model_info
from workers.models.resolve import resolve

DRAFTING = sorted(name for name, cls in discover().items() if "draft_model" in cls.model_fields)
PROMPT, NEW = 40, 8
SPEED: dict[str, Any] = {"workload": "speed", "options": {"items": 1, "prompt_tokens": PROMPT}, "max_new_tokens": NEW}


def small() -> Path:
    """One layer, one KV head: every number differs from the model's."""
    return tiny.llama_folder("draft-small", num_hidden_layers=1, num_key_value_heads=1)


def other() -> Path:
    return tiny.llama_folder("draft-other", num_hidden_layers=1)


def on_the_library(folder: Path, tokens: int) -> tuple[int, int]:
    """Bytes of all weights, and of the cache of so many tokens, of the library's own model in float32."""
    model, cache = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), DynamicCache()
    with torch.no_grad():
        model(torch.full((1, tokens), 7), past_key_values=cache)
    held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(p.numel() * 4 for p in model.parameters()), sum(t.numel() * 4 for t in held)


def needs(*lanes: str, dtype: str = "float32", batch: int = 1, drafts: tuple[Path, ...] = ()) -> plan.Needs:
    """From what is known before anything loads."""
    spec = ExperimentSpec(
        model="tiny", workload={"id": "speed", "options": SPEED["options"]}, max_new_tokens=NEW, dtype=dtype, batch=batch  # type: ignore[arg-type]
    )  # fmt: skip
    beside = {str(d): model_info(resolve(str(d))) for d in drafts}
    return plan.needs(spec, model_info(resolve(str(tiny.llama_folder()))), torch.device("cpu"), beside)


def lane(needs: plan.Needs, text: str) -> MemoryEstimate:
    return needs.lane(effective(parse_pipeline(text)))


def named(policy: str, folder: Path, more: str = "") -> str:
    return f'{policy}:draft_model="{folder}"{more}'


def test_these_policies_have_a_second_model() -> None:
    assert DRAFTING == ["speckv", "speckv-pc", "specpc", "speculative"]


@pytest.mark.parametrize("policy", DRAFTING)
def test_a_drafts_weights_and_cache_are_exact(policy: str) -> None:
    weights, cache = on_the_library(small(), PROMPT + NEW)
    found = needs(drafts=(small(),))
    without, beside = lane(found, policy), lane(found, named(policy, small()))
    assert without.weight_bytes == found.baseline.weight_bytes == on_the_library(tiny.llama_folder(), 2)[0]
    assert beside.weight_bytes - without.weight_bytes == weights
    assert beside.kv_bytes - without.kv_bytes == cache == 2 * 1 * 16 * (PROMPT + NEW) * 4
    assert beside.activation_bytes == without.activation_bytes  # the larger model's: they run in turn
    halves = lane(needs(dtype="bfloat16", drafts=(small(),)), named(policy, small()))
    assert (halves.weight_bytes, halves.kv_bytes) == (beside.weight_bytes // 2, beside.kv_bytes // 2)


@pytest.mark.parametrize("policy", DRAFTING)
def test_where_nothing_is_drafted_nothing_is_counted(policy: str) -> None:
    found, neutral = needs(drafts=(small(),)), discover()[policy].card.neutral
    knobs = "".join(f",{k}={v}" for k, v in (neutral or {}).items())
    assert lane(found, named(policy, small(), knobs)) == found.baseline
    assert plan.companions(effective(parse_pipeline(f"{policy}+rtn"))) == []


def test_weights_are_shared_caches_are_not_and_other_policies_shrink_only_the_model() -> None:
    weights, cache = on_the_library(small(), PROMPT + NEW)
    found = needs(drafts=(small(), other()))
    base, both = found.baseline, lane(found, f"{named('specpc', small(), ',keep=0.5')}+{named('speculative', small())}")
    assert (both.weight_bytes, both.kv_bytes) == (base.weight_bytes + weights, base.kv_bytes // 2 + 2 * cache)
    packed = lane(found, f"rtn:bits=8+{named('speculative', small())}")
    assert packed.weight_bytes == lane(found, "rtn:bits=8").weight_bytes + weights
    two = [effective(parse_pipeline(named("speculative", folder))) for folder in (small(), other())]
    apart, larger = on_the_library(other(), PROMPT + NEW)
    total = base.total + weights + apart + max(cache, larger)
    for free, fits in ((total, True), (total - 1, False)):
        limited = plan.Needs(base.model_copy(update={"free_bytes": free}), found.bits, found.beside)
        assert limited.fit_together([[], *two]) is fits
        assert limited.fit_together([[], two[0], two[0]])  # loaded once for both


def test_a_batch_has_as_many_drafted_caches() -> None:
    one, four = (lane(needs(batch=b, drafts=(small(),)), named("specpc", small(), ",keep=1.0")) for b in (1, 4))
    assert four.kv_bytes == 4 * one.kv_bytes
    drafted = [lane(needs(batch=b, drafts=(small(),)), named("specpc", small())).kv_bytes for b in (1, 4)]
    assert drafted[1] == 4 * drafted[0]


# -- a run ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def host() -> ModelHost:
    return ModelHost()


def test_what_is_estimated_is_what_is_measured(host: ModelHost, tiny_llama: Path) -> None:
    events = race(host, tiny_llama, named("speculative", small()), "knorm", **SPEED)
    estimate = of(events, ModelLoaded)[0].estimate
    weights, cache = on_the_library(small(), PROMPT + NEW)
    assert estimate.lane_bytes[:2] == (estimate.total, estimate.total + weights + cache)
    assert estimate.lane_bytes[2] == estimate.total - estimate.kv_bytes // 2
    turns = 2 * 8 * 4  # rotary frequencies, which are buffers, as the library keeps them twice
    assert value(events, 0, "weight_bytes") == estimate.weight_bytes + turns
    assert value(events, 1, "weight_bytes") == estimate.weight_bytes + weights + 2 * turns
    measured = value(events, 1, "kv_bytes") - value(events, 0, "kv_bytes")
    assert 0.8 * cache < measured <= cache  # the last guesses may not be read
    rows = dict(memory_rows(estimate))
    assert rows["Largest lane"].endswith("(lane 1)")
    assert "Largest lane" not in dict(memory_rows(estimate.model_copy(update={"lane_bytes": ()})))


def test_a_draft_that_does_not_fit_is_said_before_the_run(
    host: ModelHost, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate = of(race(host, tiny_llama, **SPEED), ModelLoaded)[0].estimate
    weights, cache = on_the_library(small(), PROMPT + NEW)
    lanes = [named("speculative", small()), "knorm"]
    monkeypatch.setenv(LIMIT_VARIABLE, str(estimate.total + weights + cache - 1))
    ended = {e.lane: e for e in of(race(host, tiny_llama, *lanes, **SPEED), LaneFinished)}
    assert [ended[i].status for i in range(3)] == ["finished", "unavailable", "finished"]
    assert f"with {small()} beside it needs about" in ended[1].message
    assert ended[1].message.endswith("give a smaller draft_model, or none")
    monkeypatch.setenv(LIMIT_VARIABLE, str(estimate.total + weights + cache))
    assert {e.status for e in of(race(host, tiny_llama, *lanes, **SPEED), LaneFinished)} == {"finished"}


def test_two_drafts_that_fit_only_alone_run_in_blocks(host: ModelHost, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = of(race(host, tiny_llama, **SPEED), ModelLoaded)[0].estimate
    weights, cache = on_the_library(other(), PROMPT + NEW)
    monkeypatch.setenv(LIMIT_VARIABLE, str(estimate.total + weights + cache))
    events = race(host, tiny_llama, named("speculative", small()), named("speculative", other()), **SPEED)
    assert [(e.status, e.interleaved) for e in of(events, LaneFinished)] == [("finished", False)] * 3
    assert any("do not fit into memory together" in n.text for n in of(events, Note))


def test_a_draft_that_cannot_be_found_is_its_lanes_affair(host: ModelHost, tiny_llama: Path) -> None:
    events = race(host, tiny_llama, named("speculative", Path("/no/such/draft")), "knorm", **SPEED)
    ended = {e.lane: e for e in of(events, LaneFinished)}
    assert [ended[i].status for i in range(3)] == ["finished", "failed", "finished"]
    assert "'/no/such/draft'" in ended[1].message
    assert of(events, ModelLoaded)[0].estimate.lane_bytes[1] == of(events, ModelLoaded)[0].estimate.total
