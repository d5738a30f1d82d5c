"""Calibrating: what is measured is kept and used from then on; bad requests are refused in one sentence."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from studio_state.costs import Device
from studio_state.devices import kept_profiles
from studio_state.paths import CACHE_VARIABLE, DATA_VARIABLE
from workers.calibrate import JOB
from workers.meters import device_profile as meter

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Small tensors, and folders of the test's own; the data directory."""
    monkeypatch.setattr(meter, "STREAM_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(meter, "EDGE", {"cpu": 128})
    monkeypatch.setattr(meter, "QUICK", 0.0)
    monkeypatch.setattr(meter, "_of_this_process", {})
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 1.0)  # a quiet machine
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "data"


def asked(**request: Any) -> tuple[int, list[dict[str, Any]]]:
    out = io.StringIO()
    status = JOB.run(json.dumps(request), out)
    return status, [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_calibration_measures_all_formats_and_the_analyzers_use_it(quick: Path) -> None:
    passing = meter.device_profile(CPU)
    assert (set(passing.peak), passing.calibrated) == (set(meter.IN_PASSING), "")
    assert meter.device_profile(CPU) == passing  # kept in the cache
    told: list[str] = []
    file = meter.calibrate(CPU, 0.0, quick, lambda what, done: told.append(what))
    assert told == ["memory bandwidth", *(f"products in {f}" for f in meter.FORMATS)]
    (kept,) = kept_profiles(quick)
    assert kept == Device.model_validate_json(file.read_text())
    assert (set(kept.peak), kept.source, kept.threads) == (set(meter.FORMATS), "measured", torch.get_num_threads())
    assert kept.calibrated
    assert meter.device_profile(CPU) == kept
    file.write_text("torn")
    assert meter.device_profile(CPU) == passing


def test_what_is_measured_on_a_busy_machine_says_so_and_is_not_kept(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 90.0)
    passing = meter.device_profile(CPU)
    assert passing.busy
    assert meter.device_profile(CPU) == passing  # all lanes of a run see the same
    assert not list(quick.parent.glob("cache/**/*.json"))
    meter.calibrate(CPU, 0.0, quick, lambda what, done: None)
    assert meter.device_profile(CPU).origin.endswith("while other programs ran")


def test_a_profile_of_other_threads_is_not_taken(quick: Path) -> None:
    mine = meter.device_profile(CPU)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert meter.device_profile(CPU).threads == before + 1
    finally:
        torch.set_num_threads(before)
    assert meter.device_profile(CPU) == mine


def test_a_format_that_cannot_be_multiplied_is_left_out(quick: Path) -> None:
    assert set(meter.measure(CPU, 0.0, ("float32", "bool")).peak) == {"float32"}


def test_the_worker_tells_its_progress_and_keeps_the_profile(quick: Path) -> None:
    status, events = asked(device="cpu", data=str(quick), seconds=1, threads=torch.get_num_threads())
    assert (status, [e["event"] for e in events]) == (0, [*["phase"] * (1 + len(meter.FORMATS)), "finished"])
    assert [set(d.peak) for d in kept_profiles(quick)] == [set(meter.FORMATS)]


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"data": "d", "seconds": 0}, "this is no request to calibrate: seconds: Input should be greater than or equal to 1"),
        ({"data": "d", "threads": 0}, "this is no request to calibrate: threads: Input should be greater than or equal to 1"),
        ({"data": "d", "device": "cuda:99"}, "there is no device 'cuda:99' on this machine; allowed: cpu"),
        ({}, "this is no request to calibrate: data: Field required"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(request_: dict[str, Any], sentence: str) -> None:
    status, events = asked(**request_)
    assert status > 0
    assert events[-1]["event"] == "failed"
    assert events[-1]["message"].startswith(sentence)
    assert "\n" not in events[-1]["message"]
