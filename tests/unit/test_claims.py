"""Claims as data, their change log, and the judge against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from studio_state import events as ev
from studio_state import zoo
from studio_state.catalog import Catalog, asset
from studio_state.claims import Check, Claim, find_claim, load_claims, read_claim
from studio_state.errors import SpecError, StudioError
from studio_state.estimates import Estimate
from studio_state.experiment import ExperimentSpec, ModelInfo
from studio_state.journal import append_entries, read_journal, replay
from studio_state.problems import problems
from studio_state.results import Results, results_of
from studio_state.verdicts import judge, outcome

SMOLLM2 = ModelInfo(
    name="smollm2-135m", family="llm", architecture="LlamaForCausalLM", traits=("gqa", "lean-shape", "tied-embeddings"), parameters=134_515_008,
    layers=30, hidden=576, ffn=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, context=8192, attention_layers=30,
)  # fmt: skip


def claim(*checks: dict[str, Any], **more: Any) -> Claim:
    base: dict[str, Any] = {
        "id": "x", "title": "X", "reference": "arXiv:1", "headline": "h", "source": "s", "fallback": "Told honestly.", "minutes": 1,
        "experiments": [{"id": "a", "workload": {"id": "speed"}, "lanes": ["baseline", "snapkv", "h2o"]}],
        "checks": [{"text": "t", "source": "s", "experiment": "a", **c} for c in checks],
        "log": [{"date": "2026-01-31", "digest": "0" * 16, "reason": "set before the first run"}],
    }  # fmt: skip
    return Claim.model_validate({**base, **more})


def check(**fields: Any) -> Check:
    return Check.model_validate({"id": "c", "text": "t", "source": "s", "experiment": "a", "metric": "ttft_s", **fields})


def ran(
    lanes: dict[int, dict[str, list[float]]], status: str = "finished", flags: dict[int, list[str]] | None = None, **more: Any
) -> Results:
    """Results of an experiment whose lanes took these samples (item by item); names with one number are whole-lane values."""
    spec = ExperimentSpec.model_validate({"model": "m", "workload": {"id": "speed"}, "lanes": [{}, {"name": "b"}, {"name": "c"}]})
    events: list[ev.Event] = [
        ev.Submitted(spec=spec),
        ev.Started(environment={"device_name": "a chip"}),
        ev.ModelLoaded(info=SMOLLM2),
    ]
    for lane, metrics in lanes.items():
        for name, values in metrics.items():
            if name == "right":
                events += [ev.Output(lane=lane, item=str(i), correct=bool(v)) for i, v in enumerate(values)]
            elif len(values) == 1:
                events.append(ev.Metric(lane=lane, name=name, value=values[0]))
            else:
                events += [ev.Metric(lane=lane, name=name, value=v, item=str(i)) for i, v in enumerate(values)]
        state = more.get("states", {}).get(lane, "finished")
        events.append(
            ev.LaneFinished(
                lane=lane, status=state, flags=(flags or {}).get(lane, []), message="too large" * (state != "finished")
            )
        )
    events.append(ev.Finished() if status == "finished" else ev.Failed(message="it broke"))
    return results_of(e.model_copy(update={"experiment": "20260131-000000-abcdef", "seq": i}) for i, e in enumerate(events))


# -- the packaged claims -----------------------------------------------------------------------
def test_the_first_claims_are_there() -> None:
    assert set(load_claims()) >= {"promptdistill", "snapkv", "h2o", "streamingllm", "rtn-against-magnitude"}


@pytest.mark.parametrize("name", [p.stem for p in sorted(asset("claims").glob("*.json"))])
def test_thresholds_change_only_with_a_dated_reason(name: str) -> None:
    found = find_claim(name)
    assert found.digest() == found.log[-1].digest, (
        f"{name} was changed: add a log entry with date, reason and digest {found.digest()}"
    )
    dates = [entry.date for entry in found.log]
    assert dates == sorted(dates)
    assert len({entry.digest for entry in found.log}) == len(found.log)


@pytest.mark.parametrize("name", [p.stem for p in sorted(asset("claims").glob("*.json"))])
def test_the_experiments_of_a_claim_can_run(name: str) -> None:
    catalog = Catalog.load()
    for experiment in find_claim(name).experiments:
        entry = zoo.get(experiment.model)  # of other models the family is known before they are looked at
        model = SMOLLM2 if experiment.model == SMOLLM2.name else ModelInfo(name=entry.id, family=entry.family)
        assert problems(experiment.spec(), catalog, model) == []
        assert [lane.text() for lane in experiment.spec().lanes] == list(experiment.lanes)


def test_the_limits_of_promptdistill_follow_from_its_card() -> None:
    layers, whole, tokens, kept = 30, 13, 2048, 257
    bound = layers / (whole + (layers - whole) * kept / tokens)
    limits = {c.id: c for c in find_claim("promptdistill").checks}
    assert limits["ttft"].at_most == pytest.approx(1 / (0.7 * bound), abs=5e-5)
    formula = (whole * tokens + (layers - whole) * kept) / (layers * tokens)
    assert limits["cache"].at_least <= formula <= limits["cache"].at_most


def test_promptdistill_and_its_rival_choose_as_many_tokens_in_the_same_layer() -> None:
    cards = Catalog.load().by_id
    for name in ("depth", "kernel"):  # knobs that the lanes leave as they are
        assert len({cards[policy].knobs["properties"][name]["default"] for policy in ("promptdistill", "gemfilter")}) == 1
    for check in (c for c in find_claim("promptdistill").checks if c.against):
        lanes = next(e for e in find_claim("promptdistill").experiments if e.id == check.experiment).lanes
        assert lanes[check.lane] == lanes[check.against].replace("gemfilter", "promptdistill")


def test_the_digest_sees_limits_and_lanes_but_not_words() -> None:
    plain = claim({"id": "c", "kind": "ratio", "metric": "ttft_s", "at_most": 0.5})
    assert (
        claim({"id": "c", "kind": "ratio", "metric": "ttft_s", "at_most": 0.5}, headline="said better").digest() == plain.digest()
    )
    assert claim({"id": "c", "kind": "ratio", "metric": "ttft_s", "at_most": 0.6}).digest() != plain.digest()
    other = [{"id": "a", "workload": {"id": "speed"}, "lanes": ["baseline", "snapkv:keep=0.1", "h2o"]}]
    assert claim({"id": "c", "kind": "ratio", "metric": "ttft_s", "at_most": 0.5}, experiments=other).digest() != plain.digest()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"id": "c", "kind": "ratio", "metric": "ttft", "at_most": 1}, "no metric"),
        ({"id": "c", "kind": "ratio", "metric": "ttft_s"}, "at_least"),
        ({"id": "c", "kind": "ratio", "metric": "ttft_s", "at_most": 1, "lane": 3}, "lanes 0 to 2"),
        ({"id": "c", "kind": "growth", "metric": "ttft_s", "at_most": 1}, "than"),
        ({"id": "c", "kind": "growth", "metric": "ttft_s", "at_most": 1, "than": "b"}, "no experiment 'b'"),
        ({"id": "c", "kind": "ordering", "metric": "ttft_s", "order": [1]}, "two lanes"),
        ({"id": "c", "kind": "ratio", "metric": "ttft_s", "at_most": 1, "needs": ["d"]}, "above it"),
        ({"id": "c", "kind": "ratio", "metric": "ttft_s", "at_most": 1, "headline": False}, "headline"),
    ],
)
def test_a_claim_that_does_not_hang_together_is_refused(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    data = claim({"id": "c", "kind": "ratio", "metric": "ttft_s", "at_most": 0.5}).model_dump(mode="json")
    data["checks"] = [{"text": "t", "source": "s", "experiment": "a", **fields}]
    file = tmp_path / "x.json"
    file.write_text(json.dumps(data))
    with pytest.raises(SpecError, match=words) as refused:
        read_claim(file)
    assert "\n" not in str(refused.value)


def test_files_that_are_no_claims_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(SpecError, match="cannot read the claim"):
        load_claims(tmp_path)
    (tmp_path / "x.json").write_text(
        claim({"id": "c", "kind": "ratio", "metric": "ttft_s", "at_most": 0.5}, id="y").model_dump_json()
    )
    with pytest.raises(SpecError, match=r"name the file y\.json"):
        load_claims(tmp_path)
    with pytest.raises(SpecError, match="there is no claim 'nothing'; allowed: deltallm"):
        find_claim("nothing")


# -- the rule ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "interval", "expected"),
    [
        # a gain: at most half of the time
        ({"kind": "ratio", "at_most": 0.5}, (0.40, 0.45, 0.49), "reproduced"),
        ({"kind": "ratio", "at_most": 0.5}, (0.48, 0.49, 0.51), "direction only"),
        ({"kind": "ratio", "at_most": 0.5}, (0.60, 0.70, 0.99), "direction only"),
        ({"kind": "ratio", "at_most": 0.5}, (0.70, 0.90, 1.00), "not shown"),
        ({"kind": "ratio", "at_least": 2.0}, (2.0, 2.1, 2.2), "reproduced"),
        ({"kind": "ratio", "at_least": 2.0}, (1.01, 1.5, 2.2), "direction only"),
        ({"kind": "ratio", "at_least": 2.0}, (0.99, 1.5, 2.2), "not shown"),
        ({"kind": "growth", "than": "b", "at_least": 1.0}, (1.0, 1.2, 1.4), "reproduced"),
        ({"kind": "growth", "than": "b", "at_least": 1.0}, (0.9, 1.2, 1.4), "not shown"),
        # a loss that is allowed: at most 5 % more
        ({"kind": "ratio", "at_most": 1.05}, (0.99, 1.02, 1.05), "reproduced"),
        ({"kind": "ratio", "at_most": 1.05}, (0.99, 1.02, 1.08), "direction only"),
        ({"kind": "ratio", "at_most": 1.05}, (1.00, 1.06, 1.20), "not shown"),
        ({"kind": "difference", "at_least": -0.1}, (-0.05, 0.0, 0.05), "reproduced"),
        ({"kind": "difference", "at_least": -0.1}, (-0.2, 0.0, 0.2), "direction only"),
        # two limits
        ({"kind": "ratio", "at_least": 0.504, "at_most": 0.505}, (0.5044, 0.5044, 0.5044), "reproduced"),
        ({"kind": "ratio", "at_least": 0.504, "at_most": 0.505}, (0.51, 0.51, 0.51), "not shown"),
        ({"kind": "value", "at_least": 0.3}, (0.4, 0.6, 0.8), "reproduced"),
        ({"kind": "value", "at_least": 0.3}, (0.2, 0.4, 0.6), "direction only"),
        # an order holds strictly or not at all
        ({"kind": "ordering", "order": [0, 1]}, (0.01, 0.1, 0.2), "reproduced"),
        ({"kind": "ordering", "order": [0, 1]}, (0.0, 0.1, 0.2), "not shown"),
    ],
)
def test_an_interval_against_its_limits(fields: dict[str, Any], interval: tuple[float, float, float], expected: str) -> None:
    low, value, high = interval
    assert outcome(check(**fields), Estimate(value, low, high, 5)) == expected


def test_counts_and_bytes_need_no_interval() -> None:
    asked = claim({"id": "kv", "kind": "ratio", "metric": "kv_bytes", "at_most": 0.25})
    found = judge(asked, {"a": ran({0: {"kv_bytes": [4000.0]}, 1: {"kv_bytes": [1000.0]}, 2: {}})})
    assert (found.verdict, found.checks[0].value, found.checks[0].low) == ("reproduced", 0.25, 0.25)
    assert (found.model, found.device) == ("smollm2-135m", "a chip")
    assert found.runs == {"a": "20260131-000000-abcdef"}


def test_times_are_compared_in_pairs() -> None:
    asked = claim({"id": "t", "kind": "ratio", "metric": "ttft_s", "at_most": 0.6})
    drift = [1.0, 1.5, 2.0, 3.0, 2.5, 1.2]
    found = judge(asked, {"a": ran({0: {"ttft_s": drift}, 1: {"ttft_s": [0.5 * x for x in drift]}, 2: {}})})
    assert found.verdict == "reproduced"
    assert found.checks[0].value == pytest.approx(0.5)
    single = judge(asked, {"a": ran({0: {"ttft_s": drift[:1] * 1}, 1: {"ttft_s": [0.5]}, 2: {}})})
    assert single.verdict == "not shown"


def test_perplexities_are_compared_by_window() -> None:
    asked = claim({"id": "p", "kind": "ratio", "metric": "perplexity", "at_most": 1.2})
    base = [2.0, 3.0, 2.5, 3.5]
    found = judge(asked, {"a": ran({0: {"nll": base}, 1: {"nll": [x + 0.1 for x in base]}, 2: {}})})
    assert found.checks[0].value == pytest.approx(math.exp(0.1))
    assert found.checks[0].low == pytest.approx(math.exp(0.1))
    assert found.verdict == "reproduced"


def test_few_right_answers_are_never_certain() -> None:
    asked = claim({"id": "a", "kind": "difference", "metric": "accuracy", "at_least": -0.1})
    always = [1.0] * 12
    found = judge(asked, {"a": ran({0: {"right": always}, 1: {"right": always}, 2: {}})}).checks[0]
    assert (found.value, found.n, found.outcome) == (0.0, 12, "direction only")
    # Agresti and Min: half an item in each cell, (12 + 2) items, 1.96 standard errors of 1 / 14
    assert found.low == pytest.approx(-1.959964 / 14, rel=1e-5)


def test_growth_joins_the_intervals_of_two_experiments() -> None:
    two = [{"id": name, "workload": {"id": "speed"}, "lanes": ["baseline", "snapkv", "h2o"]} for name in ("a", "b")]
    asked = claim({"id": "g", "kind": "growth", "metric": "decode_tokens_per_s", "than": "b", "at_least": 1.0}, experiments=two)
    flat = [10.0] * 6
    long, short = (
        ran({0: {"decode_tokens_per_s": flat}, 1: {"decode_tokens_per_s": [k * x for x in flat]}, 2: {}}) for k in (3.0, 1.5)
    )
    found = judge(asked, {"a": long, "b": short})
    assert (found.verdict, found.checks[0].value) == ("reproduced", pytest.approx(2.0))


def test_an_order_is_judged_by_its_worst_step() -> None:
    asked = claim({"id": "o", "kind": "ordering", "metric": "kl_to_baseline", "order": [0, 1, 2]})
    lanes = {
        0: {"kl_to_baseline": [0.0, 0.0, 0.0]},
        1: {"kl_to_baseline": [0.1, 0.11, 0.1]},
        2: {"kl_to_baseline": [0.5, 0.6, 0.55]},
    }
    assert judge(asked, {"a": ran(lanes)}).verdict == "reproduced"
    lanes[2] = {"kl_to_baseline": [0.1, 0.09, 0.12]}
    found = judge(asked, {"a": ran(lanes)})
    assert found.verdict == "not shown"
    assert found.checks[0].value == pytest.approx(0.0, abs=1e-9)


def test_the_worst_headline_check_decides_and_what_is_unchecked_caps_it() -> None:
    good = {"id": "kv", "kind": "ratio", "metric": "kv_bytes", "at_most": 0.5}
    bad = {"id": "w", "kind": "ratio", "metric": "weight_bytes", "at_most": 0.5}
    results = {"a": ran({0: {"kv_bytes": [4.0], "weight_bytes": [4.0]}, 1: {"kv_bytes": [1.0], "weight_bytes": [4.0]}, 2: {}})}
    assert judge(claim(good, bad), results).verdict == "not shown"
    assert judge(claim(good, {**bad, "headline": False}), results).verdict == "reproduced"
    capped = judge(claim(good, unchecked=["a rival that is not built"]), results)
    assert capped.verdict == "direction only"
    assert capped.text == "1 of 1 checks of the headline are reproduced. Not checked: a rival that is not built. Told honestly."


def test_a_check_whose_ground_is_missing_cannot_be_shown() -> None:
    able = {"id": "able", "kind": "value", "metric": "accuracy", "lane": 0, "at_least": 0.5, "headline": False}
    keeps = {"id": "keeps", "kind": "difference", "metric": "accuracy", "at_least": -0.5, "needs": ["able"]}
    never = [0.0] * 20
    found = judge(claim(able, keeps), {"a": ran({0: {"right": never}, 1: {"right": never}, 2: {}})})
    assert found.verdict == "cannot be shown on this hardware"
    assert "which is not shown with this model" in found.checks[1].reason


def test_lanes_that_were_idle_or_did_not_fit() -> None:
    asked = claim({"id": "kv", "kind": "ratio", "metric": "kv_bytes", "at_most": 0.5})
    lanes = {0: {"kv_bytes": [4.0]}, 1: {"kv_bytes": [1.0]}, 2: {}}
    idle = judge(asked, {"a": ran(lanes, flags={1: ["no effect: the prompts were too short"]})})
    assert (idle.verdict, idle.checks[0].reason) == ("not shown", "no effect: the prompts were too short")
    away = judge(asked, {"a": ran(lanes, states={1: "unavailable"})})
    assert (away.verdict, away.checks[0].reason) == ("cannot be shown on this hardware", "too large")


def test_failed_runs_are_not_judged() -> None:
    asked = claim({"id": "kv", "kind": "ratio", "metric": "kv_bytes", "at_most": 0.5})
    with pytest.raises(StudioError, match="was not run"):
        judge(asked, {})
    with pytest.raises(StudioError, match="ended as failed: it broke"):
        judge(asked, {"a": ran({0: {}, 1: {}, 2: {}}, status="failed")})
    with pytest.raises(StudioError, match="lane 1 of experiment a ended as failed"):
        judge(asked, {"a": ran({0: {}, 1: {}, 2: {}}, states={1: "failed"})})


def test_the_verdict_goes_to_the_journal_with_runs_and_numbers(tmp_path: Path) -> None:
    asked = claim({"id": "kv", "kind": "ratio", "metric": "kv_bytes", "at_most": 0.5})
    found = judge(asked, {"a": ran({0: {"kv_bytes": [4.0]}, 1: {"kv_bytes": [1.0]}, 2: {}})})
    append_entries(tmp_path / "journal.jsonl", found.entries(by="cli"))
    state = replay(read_journal(tmp_path / "journal.jsonl").entries)
    kept = state.verdicts["20260131-000000-abcdef", "x"]
    assert (kept.verdict, kept.by) == ("reproduced", "cli")
    assert kept.numbers["runs"] == {"a": "20260131-000000-abcdef"}
    assert kept.numbers["digest"] == asked.digest()
    assert kept.numbers["checks"][0]["value"] == 0.25
