"""Spool and data directory: numbering, torn lines, full disk, places that cannot be written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio_state import events as ev
from studio_state.errors import StoreError
from studio_state.experiment import ExperimentSpec, WorkloadSpec
from studio_state.paths import DataDir, default_cache_root, default_data_root
from studio_state.spool import SpoolWriter, is_alive, lock_path, new_experiment_id, read_spool

MEGABYTE = 1 << 20


def note(text: str) -> ev.Note:
    return ev.Note(text=text)


def texts(path: Path, since: int = 0) -> list[str]:
    return [e.text for e in read_spool(path, since)]


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return DataDir.at(tmp_path / "data", tmp_path / "cache").open()


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow beyond ``size`` bytes: a write stops half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_ids_sort_by_time_and_are_safe() -> None:
    ids = {new_experiment_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", x) for x in ids)


def test_events_are_numbered_from_zero_and_carry_the_experiment(data: DataDir) -> None:
    with SpoolWriter(data.spool("e1")) as writer:
        first = writer.append(note("a"))
        rest = writer.append_all([note("b"), ev.Finished(seconds=2.0)])
        assert writer.ended
    assert [(e.experiment, e.seq) for e in [first, *rest]] == [("e1", 0), ("e1", 1), ("e1", 2)]
    lines = [json.loads(x) for x in data.spool("e1").read_text().splitlines()]
    assert [(x["experiment"], x["seq"], x["event"]) for x in lines] == [
        ("e1", 0, "note"),
        ("e1", 1, "note"),
        ("e1", 2, "finished"),
    ]


def test_writer_goes_on_where_the_file_ends(data: DataDir) -> None:
    for text in "ab":
        with SpoolWriter(data.spool("e1")) as writer:
            writer.append(note(text))
    assert [(e.seq, e.text) for e in read_spool(data.spool("e1"))] == [(0, "a"), (1, "b")]
    assert texts(data.spool("e1"), since=1) == ["b"]


def test_torn_last_line_is_not_read_and_does_not_swallow_the_next_event(data: DataDir) -> None:
    path = data.spool("e1")
    with SpoolWriter(path) as writer:
        writer.append(note("a"))
    whole = note("torn").model_copy(update={"experiment": "e1", "seq": 1}).line()
    with open(path, "a") as file:
        file.write(whole[:25])
    reader = read_spool(path)
    assert ([e.text for e in reader], reader.torn, reader.skipped) == (["a"], True, 0)
    with SpoolWriter(path) as writer:
        assert writer.append(note("b")).seq == 1
    reader = read_spool(path)
    assert ([(e.seq, e.text) for e in reader], reader.torn, reader.skipped) == ([(0, "a"), (1, "b")], False, 1)


def test_foreign_lines_are_counted_not_raised(data: DataDir) -> None:
    path = data.spool("e1")
    good = [note(x).model_copy(update={"experiment": "e1", "seq": i}).line().encode() for i, x in enumerate("ab")]
    stranger = note("x").model_copy(update={"experiment": "other", "seq": 1}).line().encode()
    unknown = b'{"event":"from_the_future","experiment":"e1","seq":2,"t":1.0,"colour":"red"}'
    bad = [b"\xff\xfe\x00", b"[1]", b"not json", b'{"event":"metric","experiment":"e1","seq":9}', stranger, good[0]]
    path.write_bytes(b"\n".join([good[0], *bad, b"", good[1], unknown]) + b"\n")
    reader = read_spool(path)
    found = list(reader)
    assert [e.seq for e in found] == [0, 1, 2]
    assert isinstance(found[2], ev.Unknown)
    assert found[2].model_extra["colour"] == "red"
    assert reader.skipped == len(bad)


def test_reading_goes_on_from_an_offset(data: DataDir) -> None:
    path = data.spool("e1")
    with SpoolWriter(path) as writer:
        writer.append_all([note("a"), note("b")])
        first = read_spool(path)
        assert [e.text for e in first] == ["a", "b"]
        assert first.offset == path.stat().st_size
        writer.append(note("c"))
    second = read_spool(path, since=first.last + 1, offset=first.offset)
    assert ([e.text for e in second], second.skipped) == (["c"], 0)
    assert texts(data.spool("missing")) == []


def test_a_writer_is_alive_until_it_closes_or_dies(data: DataDir) -> None:
    path = data.spool("e1")
    code = (
        "import sys; from pathlib import Path; from studio_state.spool import SpoolWriter;"
        "w = SpoolWriter(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"open\n"
    assert is_alive(path)
    with pytest.raises(StoreError, match="recorded by another process"):
        SpoolWriter(path)
    child.kill()
    child.communicate()
    assert not is_alive(path)
    with SpoolWriter(path) as writer:
        assert is_alive(path)
        writer.append(ev.Cancelled())
    assert not is_alive(path)
    assert not lock_path(path).exists()


def test_wrong_experiment_and_closed_writer_are_refused(data: DataDir) -> None:
    writer = SpoolWriter(data.spool("e1"))
    with pytest.raises(ValueError, match="in the spool of e1"):
        writer.append(note("a").model_copy(update={"experiment": "e2"}))
    writer.close()
    with pytest.raises(StoreError, match="closed"):
        writer.append(note("a"))
    assert data.spool("e1").read_bytes() == b""


def test_full_disk_is_one_sentence_and_leaves_whole_lines(data: DataDir) -> None:
    path = data.spool("e1")
    with SpoolWriter(path) as writer:
        writer.append(note("x" * MEGABYTE))
        before = path.read_bytes()
        with largest_file(len(before) + 100), pytest.raises(StoreError) as error:
            writer.append_all([note("y" * 400), note("z")])
        assert str(error.value).count("\n") == 0
        assert "free it, or choose another folder" in str(error.value)
        assert path.read_bytes() == before
        assert writer.append(note("after")).seq == 1
    assert [e.text[:5] for e in read_spool(path)] == ["xxxxx", "after"]


def test_really_full_device_says_so() -> None:
    from studio_state.paths import cannot

    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError) as error:
        full.write(b"x")
    assert "the disk is full" in str(cannot("write the record", error.value))


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    place = tmp_path / "data"
    place.write_text("mine")
    for root in (place, place / "below"):
        with pytest.raises(StoreError, match="is a file, not a folder"):
            DataDir.at(root).open()
    assert place.read_text() == "mine"


def test_a_directory_that_may_not_be_written(tmp_path: Path) -> None:
    place = tmp_path / "data"
    place.mkdir(mode=0o500)
    root = os.geteuid() == 0  # root may write anywhere: look as another user
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(
            StoreError, match="may not be written by this user; free it, or choose another folder with --data-dir"
        ):
            DataDir.at(place).open()
    finally:
        if root:
            os.seteuid(0)
    assert list(place.iterdir()) == []


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETO_STUDIO_DATA", str(tmp_path / "d"))
    monkeypatch.setenv("PARETO_STUDIO_CACHE", str(tmp_path / "c"))
    assert (default_data_root(), default_cache_root()) == (tmp_path / "d", tmp_path / "c")
    data = DataDir.at()
    assert (data.root, data.cache) == (tmp_path / "d", tmp_path / "c")
    assert not data.root.exists()
    monkeypatch.delenv("PARETO_STUDIO_DATA")
    assert default_data_root().name == "pareto-studio"


@pytest.mark.parametrize("bad", ["../secret", "a/b", "", ".hidden", "a\0b", "x" * 200])
def test_ids_cannot_name_files_elsewhere(data: DataDir, bad: str) -> None:
    with pytest.raises(StoreError, match="is not an experiment id"):
        data.spool(bad)
    with pytest.raises(StoreError, match="is not an artifact"):
        data.artifact(bad)


def test_artifacts_are_kept_once_under_their_sha256(data: DataDir) -> None:
    digest = data.keep_artifact(b"hello")
    assert digest == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert data.keep_artifact(b"hello") == digest
    assert [p.read_bytes() for p in data.artifacts.rglob("*") if p.is_file()] == [b"hello"]


def test_a_spec_survives_the_spool(data: DataDir) -> None:
    spec = ExperimentSpec(model="ünï/模型", workload=WorkloadSpec(id="prompts", options={"text": 'line\n"two"\u2028\x00'}))
    with SpoolWriter(data.spool("e1")) as writer:
        writer.append(ev.Submitted(spec=spec))
    (event,) = read_spool(data.spool("e1"))
    assert isinstance(event, ev.Submitted)
    assert event.spec == spec
