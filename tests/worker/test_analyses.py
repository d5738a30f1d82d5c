"""Analyzers in a race: what they find is told, their metrics are the lane's, and the lane is what it was without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from studio_state.events import Analysis, LaneFinished, Metric, Note
from studio_state.metrics import METRICS
from studio_state.results import results_of
from tests.worker.test_engine import of, race, value
from workers.host import ModelHost


def test_metrics_of_analyzers_are_the_lanes(tiny_llama: Path) -> None:
    wanted = ("runtime-dissection", "llm-viewer")
    events = race(ModelHost(), tiny_llama, "snapkv:keep=0.5,window=4", analyzers=wanted)
    assert [(e.lane, e.analyzer) for e in of(events, Analysis)] == [(lane, name) for lane in (0, 1) for name in wanted]
    assert not [n for n in of(events, Note) if n.level == "warning"]
    assert [e.flags for e in of(events, LaneFinished)] == [[], []]
    found = results_of(events)
    for lane in found.lanes:
        assert len(lane.samples["products_share"]) == 3  # passes, so that there is an interval
        assert lane.value("memory_bound_share") == pytest.approx(1)
        assert lane.sources["roofline_decode_s"] == "estimated"
    assert found.lanes[1].value("roofline_decode_s") < found.lanes[0].value("roofline_decode_s")  # type: ignore[operator]
    assert {e.name for e in of(events, Metric)} <= set(METRICS)
    assert value(events, 0, "prefill_layers_share") <= 1
