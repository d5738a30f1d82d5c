"""How far memory estimates were off, from a real database file, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli_run import memory_remarks
from app.models import memory_rows, pending_rows
from studio_state import events as ev
from studio_state.estimate_errors import EstimateErrors, estimate_errors, expected
from studio_state.experiment import ExperimentSpec, MemoryEstimate, ModelInfo
from studio_state.history import History
from studio_state.journal import Delete
from studio_state.paths import DataDir
from studio_state.spool import SpoolWriter
from studio_state.store import Store

IDS = ("20260101-100000-00000a", "20260101-100000-00000b", "20260101-100000-00000c")


def estimate(*lanes: int) -> MemoryEstimate:
    return MemoryEstimate(weight_bytes=800, kv_bytes=150, activation_bytes=50, free_bytes=10_000, lane_bytes=lanes)


def record(data: DataDir, experiment: str, told: MemoryEstimate | None, peaks: dict[int, float]) -> None:
    spec = ExperimentSpec.model_validate({"model": "m", "workload": {"id": "speed"}, "lanes": [{}, {"name": "b"}]})
    info = ModelInfo(name="m", family="llm")
    events: list[ev.Event] = [ev.Submitted(spec=spec, t=1.0), ev.Started(), ev.ModelLoaded(info=info, estimate=told)]
    for lane, peak in peaks.items():
        events += [
            ev.Metric(lane=lane, name="peak_memory_bytes", value=1.0, item="an item's own"),
            ev.Metric(lane=lane, name="peak_memory_bytes", value=peak),
            ev.Metric(lane=lane, name="weight_bytes", value=7.0),
        ]
    with SpoolWriter(data.spool(experiment)) as spool:
        for event in (*events, ev.Finished()):
            spool.append(event)


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    data = DataDir.at(tmp_path / "data", tmp_path / "cache").open()
    record(data, IDS[0], estimate(1000, 400), {0: 1250.0, 1: 500.0})  # a fifth too little, twice
    record(data, IDS[1], estimate(), {0: 800.0, 1: 500.0})  # a quarter too much; of lane 1 nothing was expected
    record(data, IDS[2], None, {0: 800.0})
    return data


def test_errors_by_hand_from_the_studios_file(data: DataDir) -> None:
    with Store(data) as store:
        store.refresh()
        store.flush()
        found = estimate_errors(store.memory_needs())
        assert found is not None
        assert (found.median, found.worst, found.runs) == (pytest.approx(0.2), pytest.approx(0.25), 3)
        assert found.sentence() == "estimates were off by 20 % at the median over 3 runs (worst +25 %)"
        store.record(Delete(experiment=IDS[1]))
        assert estimate_errors(store.memory_needs()) == (pytest.approx(0.2), pytest.approx(-0.2), 2)
        assert len(store.memory_needs(newest=1)) == 2
    assert data.database.is_file()
    with History.in_memory(data) as past:
        assert len(past.memory_needs()) == 2


def test_what_cannot_be_compared_is_left_out() -> None:
    assert estimate_errors([]) is None
    assert estimate_errors([(estimate(), 1, 100.0), (estimate(), 0, 0.0)]) is None
    assert (expected(estimate(), 0), expected(estimate(), 1), expected(estimate(5, 6), 1)) == (1000, None, 6)
    assert EstimateErrors(0.5, -0.5, 1).sentence() == "estimates were off by 50 % at the median over 1 run (worst -50 %)"


def test_the_error_stands_beside_the_estimate_on_the_page_and_keeps_its_place(data: DataDir) -> None:
    errors = EstimateErrors(0.2, -0.3, 4)
    rows = dict(memory_rows(estimate(), errors))
    assert rows["So far"] == errors.sentence()
    waiting = dict(pending_rows(ModelInfo(name="m", family="llm"), errors))
    assert [k for k in waiting if k in rows] == list(rows)
    assert "So far" not in dict(memory_rows(estimate()))


def test_the_terminal_says_what_was_expected_what_was_taken_and_how_far_off_it_is(data: DataDir) -> None:
    lanes = [{"lane": 0, "metrics": {"peak_memory_bytes": 1250.0}}, {"lane": 1, "metrics": {}}]
    report = {"experiment": {"estimate": estimate(1000, 400).model_dump(mode="json")}, "lanes": lanes}
    assert memory_remarks(report, data) == [
        "memory, estimated before loading: lane 0 1.00 kB (peak measured: 1.25 kB), lane 1 400 B; "
        "estimates were off by 20 % at the median over 3 runs (worst +25 %)"
    ]
    assert memory_remarks({"experiment": {"estimate": None}, "lanes": lanes}, data) == []
