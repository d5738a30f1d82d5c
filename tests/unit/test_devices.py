"""Profiles of devices: what makers publish, what a calibration keeps, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.cli_calibrate import measure, show
from app.dispatch.device_lock import VARIABLE, DeviceLock
from studio_state.costs import Device
from studio_state.devices import find_device, kept_profiles, profile_file, published, read_profile, write_profile
from studio_state.errors import DeviceBusy, SpecError, StoreError

MINE = Device(name="chip", bandwidth=9e9, peak={"float32": 5e10}, source="measured", threads=2, calibrated="2026-01-31")


def test_published_profiles_name_their_source_and_are_dense() -> None:
    for name, device in published().items():
        assert device.source == "published"
        assert device.reference, name
        halved = [device.peak[f] for f in ("int8", "float16") if f in device.peak]
        assert not halved or halved[0] / halved[1] == pytest.approx(2, rel=0.01) or name in ("rtx-4090", "rtx-3090")
        assert device.peak["float32"] <= min(device.peak.values())
    assert {"a100-80gb", "h100-sxm", "rtx-4090", "rtx-a6000", "t4"} <= set(published())
    assert find_device("a100-80gb").ridge("float16") == pytest.approx(312e12 / 2039e9)
    assert find_device("t4").best("bfloat16") == 65e12  # not listed: the best of the floats, never the integers'


def test_a_published_profile_that_is_not_there_is_refused_in_one_sentence() -> None:
    with pytest.raises(SpecError, match="there is no published device 'a1000'; allowed: a100-40gb, ") as refused:
        find_device("a1000")
    assert "\n" not in str(refused.value)


def test_a_kept_profile_comes_back_and_each_setting_has_its_own(tmp_path: Path) -> None:
    file = profile_file(tmp_path, "chip", 2, "2.0")
    assert read_profile(file) is None
    write_profile(file, MINE)
    assert read_profile(file) == MINE
    assert kept_profiles(tmp_path) == [MINE]
    others = {
        profile_file(tmp_path, *x) for x in (("chip", 1, "2.0"), ("chip", 2, "2.1"), ("chop", 2, "2.0"), ("chip", None, "2.0"))
    }
    assert len(others | {file}) == 5
    file.write_text("{}")
    assert read_profile(file) is None
    assert kept_profiles(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "devices").write_text("")
    with pytest.raises(StoreError, match=r"cannot keep the profile of the device in .*: .* is a file, not a folder") as told:
        write_profile(profile_file(tmp_path, "chip", 2, "2.0"), MINE)
    assert "\n" not in str(told.value)


def test_where_numbers_come_from_in_words() -> None:
    assert MINE.origin == "calibrated here on 2026-01-31 on 2 threads"
    busy = MINE.model_copy(update={"busy": True})
    assert busy.origin == "calibrated here on 2026-01-31 on 2 threads while other programs ran"
    passing = MINE.model_copy(update={"calibrated": "", "threads": 1})
    assert passing.origin == "measured here in passing on 1 thread; `pareto-studio calibrate` measures longer"
    assert Device(name="x", bandwidth=1, peak={"float32": 1}).origin == "published"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"seconds": 0.0}, "--seconds is 0; give 1 to 600"),
        ({"seconds": float("nan")}, "--seconds is nan; give 1 to 600"),
        ({"threads": 0}, "--threads is 0; give 1 to 1024, or leave it out for all cores"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_starts(given: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as refused:
        measure(**{"device": "cpu", "threads": None, "seconds": 30.0, "data": tmp_path, **given})
    assert str(refused.value).rstrip(".") == sentence
    assert not list(tmp_path.iterdir())


def test_a_device_that_works_is_not_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "locks"))
    lock = DeviceLock("cpu")
    assert lock.acquire(0, "20260101-000000-aaaaaa")
    try:
        with pytest.raises(DeviceBusy, match=r"experiment 20260101-000000-aaaaaa\); calibrate when it has finished"):
            measure("cpu", None, 30.0, tmp_path)
    finally:
        lock.release()


def test_kept_and_published_profiles_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    show([("", MINE), ("t4", find_device("t4"))], as_json=True)
    kept, listed = json.loads(capsys.readouterr().out)
    assert (kept["id"], kept["bandwidth"], kept["source"]) == ("", 9e9, "measured")
    assert (listed["id"], listed["peak"]["float16"]) == ("t4", 65e12)
