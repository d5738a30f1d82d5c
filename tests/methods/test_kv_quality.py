"""The bench of cache quality: one row a budget, as the engine's own race gives them, without a race's warm-ups."""

from __future__ import annotations

import pytest

from studio_state.errors import StudioError
from studio_state.experiment import ExperimentSpec, WorkloadSpec
from studio_state.pipeline import Pipeline, parse_pipeline
from tests import tiny
from workers.bench import kv_quality
from workers.bench.kv_policies import cache_policies
from workers.bench.kv_quality import Row, measured, told
from workers.bench.lanes import measure
from workers.bench.untimed import Untimed
from workers.host import ModelHost


def windows() -> ExperimentSpec:
    options = {"items": 2, "context": 48, "score": 8}
    return ExperimentSpec(model=str(tiny.llama_folder()), workload=WorkloadSpec(id="perplexity", options=options))


def test_values_are_those_of_a_race() -> None:
    pipelines = [parse_pipeline(text) for text in ("knorm:keep=0.25", "random-kv:keep=0.5")]
    names = ("perplexity", "kl_to_baseline", "kv_bytes")
    raced = measure(windows().model_copy(update={"lanes": (Pipeline(), *pipelines)}), names)
    untimed = Untimed(windows(), ModelHost(), pipelines)
    for lane, race in zip([untimed.base, *untimed.lanes], raced, strict=True):
        found = untimed.run(lane)
        assert {n: found[n] for n in names} == race.means
        assert "warmup_s" not in found
        assert "peak_memory_bytes" not in found


def test_a_lane_that_fails_leaves_the_others_alone() -> None:
    wrong, right = parse_pipeline("dynamic-int8+rtn"), parse_pipeline("knorm:keep=0.5")
    untimed = Untimed(windows(), ModelHost(), [wrong, right])
    untimed.run(untimed.base)
    with pytest.raises(StudioError, match="Dynamic int8"):
        untimed.run(untimed.lanes[0])
    assert untimed.run(untimed.lanes[1])["kl_to_baseline"] > 0


def test_lanes_that_are_not_compared_have_no_distance() -> None:
    untimed = Untimed(windows(), ModelHost(), [parse_pipeline("knorm:keep=0.5")], compared=False)
    untimed.run(untimed.base)
    found = untimed.run(untimed.lanes[0])
    assert found["perplexity"] > 0
    assert "kl_to_baseline" not in found


def test_a_row_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {n: cls for n, cls in cache_policies().items() if n in ("knorm", "kivi")}
    monkeypatch.setattr(kv_quality, "cache_policies", lambda: named)
    base, *rows = measured([windows()], (0.5, 0.1))
    assert [(r.policy, r.keep) for r in rows] == [("knorm", 0.5), ("knorm", 0.1), ("kivi", None)]
    assert base.values["kl_to_baseline"] == 0
    assert 0 < rows[0].values["kl_to_baseline"] < rows[1].values["kl_to_baseline"]


def test_needles_are_told_as_a_count() -> None:
    assert told(Row("knorm", 0.25, {"accuracy": 0.375, "perplexity": 21.5, "kl_to_baseline": 0.01}), 8) == (
        "| knorm | 0.25 | 3 | 21.500 | 0.010 |"
    )
    assert told(Row("kivi", message="no room"), 8) == "| kivi |  |  |  | no room |"
