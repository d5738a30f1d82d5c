"""Dominance against its definition, the noise band, and that the chart really draws what the frame says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import vl_convert
from hypothesis import given, settings
from hypothesis import strategies as st

from app.compare_pareto import baseline_band, pareto_figure, pareto_frame
from app.compare_runs import default_quality, quality, speed_and_memory
from app.components.charts import Band
from studio_state import events as ev
from tests.unit.compare_record import Record

SPEED, ACCURACY, LATENCY, PERPLEXITY = "decode_tokens_per_s", "accuracy", "ttft_s", "perplexity"


def points(values: list[tuple[float, float]], x: str, y: str) -> dict[str, dict[str, float]]:
    """One lane a point; the first is the baseline."""
    names = ["baseline", *(f"snapkv:keep=0.{i + 1}" for i in range(len(values) - 1))]
    return {name: {x: a, y: b} for name, (a, b) in zip(names, values, strict=True)}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=8))
def test_dominated_is_what_the_definition_says(tmp_path_factory: pytest.TempPathFactory, values: list[tuple[int, int]]) -> None:
    record = Record(tmp_path_factory.mktemp("pareto"))
    record.add(points([(float(a), float(b)) for a, b in values], LATENCY, ACCURACY))  # latency: lower is better
    frame = pareto_frame(record.picked(), LATENCY, ACCURACY)
    wanted = [any(c <= a and d >= b and (c, d) != (a, b) for c, d in values) for a, b in values]
    assert frame["dominated"].tolist() == wanted
    assert frame["dim"].tolist() == [w and i > 0 for i, w in enumerate(wanted)]


def test_other_work_and_other_baselines_beat_nobody(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.add(points([(10, 0.9), (5, 0.5)], SPEED, ACCURACY))
    record.add({"baseline": {SPEED: 99, ACCURACY: 1.0}}, workload="multiple-choice")
    record.add({"baseline": {SPEED: 11, ACCURACY: 0.95}})
    frame = pareto_frame(record.picked(), SPEED, ACCURACY).set_index("run")
    assert frame["dominated"].to_dict() == {"e0000/0": False, "e0000/1": True, "e0001/0": False, "e0002/0": False}
    figure = pareto_figure(record.picked(), SPEED, ACCURACY, None)
    assert "different workloads (multiple-choice, needle)" in figure["warning"]
    assert [row["cells"][-1][:9] for row in figure["table"]["rows"]] == ["baseline", "beaten by", "baseline", "baseline"]


def test_the_band_covers_items_and_other_baselines(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(10, 1, 40)
    record = Record(tmp_path)
    more = [ev.Metric(lane=0, name=SPEED, value=float(v), item=f"i{i}") for i, v in enumerate(samples)]
    more.append(ev.Metric(lane=0, name=ACCURACY, value=0.8, low=0.7, high=0.88, n=40))
    record.add({"baseline": {SPEED: 10.0}, "h2o:keep=0.5": {SPEED: 10.1, ACCURACY: 0.79}}, more=more)
    history = record.history()
    band = baseline_band(history, record.picked(history), SPEED, ACCURACY)
    assert band is not None
    assert (band.y_low, band.y_high, band.n) == (0.7, 0.88, 40)
    half = 1.96 * samples.std(ddof=1) / np.sqrt(40)  # the textbook interval of a mean
    assert (band.x_high - band.x_low) / 2 == pytest.approx(half, rel=0.15)
    assert (
        "h2o:keep=0.5 lies within the baseline's noise" in pareto_figure(record.picked(history), SPEED, ACCURACY, band)["summary"]
    )
    record.add({"baseline": {SPEED: 14.0, ACCURACY: 0.8}})
    history = record.history()
    wider = baseline_band(history, record.picked(history), SPEED, ACCURACY)
    assert wider is not None
    assert wider.x_high == 14.0


def test_axes_are_chosen_by_what_the_runs_hold(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.add(
        {
            "baseline": {SPEED: 1, ACCURACY: 0, "top1_agreement": 1, "kv_bytes": 9, "load_s": 3},
            "h2o": {SPEED: 2, ACCURACY: 0, "top1_agreement": 0.5},
        }
    )
    assert speed_and_memory(record.picked()) == [SPEED, "kv_bytes"]
    assert quality(record.picked()) == [ACCURACY, "top1_agreement"]
    assert default_quality(record.picked()) == "top1_agreement"  # accuracy tells nobody apart
    record.add({"baseline": {"score_tokens_per_s": 5, PERPLEXITY: 20}}, workload="perplexity")
    only = record.picked()[2:]
    assert default_quality(only) == PERPLEXITY
    assert pareto_figure(only, SPEED, PERPLEXITY, None)["empty"].startswith(
        "None of the picked runs has both decode speed and perplexity"
    )


def test_the_chart_draws_every_point(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.add(points([(10, 0.9), (14, 0.9), (5, 0.5), (20, 0.2)], SPEED, ACCURACY))
    figure = pareto_figure(record.picked(), SPEED, ACCURACY, Band(9, 11, 0.8, 0.95))
    (spec,) = figure["specs"]
    svg = vl_convert.vegalite_to_svg({**spec, "width": 600})
    assert [len(re.findall(f">{mark}</text>", svg)) for mark in "●■▲◆"] == [1, 1, 1, 1]
    assert svg.count(">snapkv:keep=0.1<") == 1
    assert "Decode speed, tokens/s · → better" in svg
    assert figure["summary"] == (
        "snapkv:keep=0.1 and snapkv:keep=0.3 are on the front: no other run is at least as good in decode speed and accuracy; 1 of 3 is beaten."
    )
