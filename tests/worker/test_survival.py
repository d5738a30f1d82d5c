"""Killed workers, killed commands, full and read-only disks: a clear sentence, and every finished run still there."""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pytest

from app.dispatch.local import LocalDispatch
from app.dispatch.runner import Settings
from studio_state.events import Event, Failed, Finished, LaneFinished
from studio_state.experiment import ExperimentSpec
from studio_state.history import History
from studio_state.migrations import TABLES
from studio_state.paths import DataDir
from studio_state.pipeline import parse_pipeline
from studio_state.spool import read_spool
from studio_state.store import Store
from tests.tiny import llama_folder

PATIENCE_S = 180
TEXT = "The secret number for Lisbon is 4071; remember it well."
Start = Callable[..., Any]


def tables(history: History) -> dict[str, list[tuple[Any, ...]]]:
    return {name: history.table(name) for name in TABLES}


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


# -- SIGKILL of the worker

KILLS = [pytest.param(4, 2, id="six"), pytest.param(14, 6, id="twenty", marks=pytest.mark.slow)]  # in a run, at the start


class Desk:
    """A dispatcher whose worker can be killed: the process ids of its workers, oldest first, are in a file."""

    def __init__(self, data: DataDir, store: Store, pids: Path) -> None:
        self.pids = pids
        self.dispatch = LocalDispatch(data, store=store, settings=Settings(command=self.command))

    def command(self, device: str) -> list[str]:
        worker = f"exec '{sys.executable}' -P -m workers serve --device {device}"
        return ["sh", "-c", f"echo $$ >> '{self.pids}'; {worker}"]

    def started(self) -> int:
        return len(self.pids.read_text().split()) if self.pids.exists() else 0

    def kill(self) -> None:
        os.kill(int(self.pids.read_text().split()[-1]), signal.SIGKILL)

    def submit(self, model: Path, *lanes: str, items: int, new: int) -> str:
        spec = ExperimentSpec(
            model=str(model),
            workload={"id": "speed", "options": {"items": items, "prompt_tokens": 64}},  # type: ignore[arg-type]
            lanes=tuple(map(parse_pipeline, lanes)),
            threads=1,
            max_new_tokens=new,
        )
        return self.dispatch.submit(spec)

    def ended(self, experiment: str) -> list[Event]:
        events = list(self.dispatch.follow(experiment, timeout=PATIENCE_S))
        assert events[-1].event in ("finished", "failed"), events[-3:]  # type: ignore[attr-defined]
        return events


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return DataDir.at(tmp_path / "data").open()


@pytest.fixture
def desks(data: DataDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, list[Desk]]]:
    """Two, so that the worker of one starts while that of the other runs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Store(data) as store:
        opened = [Desk(data, store, tmp_path / f"pids{i}") for i in range(2)]
        yield store, opened
        for desk in opened:
            desk.dispatch.close()


@pytest.mark.parametrize(("in_a_run", "at_start"), KILLS)
def test_kills_of_the_worker_at_random_points(
    desks: tuple[Store, list[Desk]], data: DataDir, in_a_run: int, at_start: int
) -> None:
    store, pair = desks
    dice, short, long = random.Random(20), llama_folder(), llama_folder("survivor", num_hidden_layers=3)
    finished: dict[str, list[Event]] = {}
    phases: set[str] = set()
    at_the_start = set(dice.sample(range(in_a_run), at_start))

    def lost(desk: Desk, experiment: str) -> None:
        events = desk.ended(experiment)
        assert isinstance(events[-1], Failed)
        assert events[-1].message.startswith("the worker process was ended by SIGKILL ")
        assert "\n" not in events[-1].message
        assert [e.seq for e in events] == list(range(len(events)))
        assert list(read_spool(data.spool(experiment))) == events
        phases.add(events[-1].phase)

    for number in range(in_a_run):
        desk, other = pair[number % 2], pair[1 - number % 2]
        if number in at_the_start:  # this desk has no worker yet
            before = desk.started()
            doomed = desk.submit(long, "rtn:bits=4", items=100, new=256)
            until(lambda d=desk, n=before: d.started() > n, "no worker was started")
            time.sleep(dice.random() * 1.5)
            desk.kill()
            lost(desk, doomed)
        if number + 1 not in at_the_start:
            other.dispatch.warm()
        fine = desk.submit(short, "rtn:bits=4", items=1, new=4)
        finished[fine] = desk.ended(fine)
        assert isinstance(finished[fine][-1], Finished), finished[fine][-1]
        doomed = desk.submit(long, "rtn:bits=4", "h2o:keep=0.5", items=100, new=256)
        target = dice.choice((2, 3, 4, 5, 6, 8, 12, 16, 20, 30, 50, 80))
        until(lambda d=desk, e=doomed, n=target: len(d.dispatch.since(e)) >= n, "it did not get so far")
        desk.kill()
        lost(desk, doomed)

    assert len(phases) >= min(4, at_start), phases
    store.flush()
    rows = {r.id: r.status for r in store.experiments(limit=1000)}
    assert len(rows) == 2 * in_a_run + at_start
    assert {e for e, status in rows.items() if status == "finished"} == set(finished)
    live = tables(store)
    for experiment, events in finished.items():
        assert [e.status for e in events if isinstance(e, LaneFinished)] == ["finished"] * 2
        assert list(read_spool(data.spool(experiment))) == events
    store.rebuild()
    assert tables(store) == live
    with History.in_memory(data) as history:
        assert tables(history) == live


# -- the command is killed or stopped


def words(data: DataDir, *more: object) -> list[object]:
    common = ["--data-dir", data.root, "--threads", 1, "--set", "prompt_tokens=64", "--lane", "h2o:keep=0.5"]
    return ["run", "--model", llama_folder(), "--workload", "speed", *common, *more]


def wait_for(data: DataDir, kind: str) -> Path:
    """The only spool, when an event of this kind is in it."""
    until(lambda: any(f'"event":"{kind}"' in p.read_text() for p in data.spools.glob("*.jsonl")), f"no {kind} event")
    [path] = data.spools.glob("*.jsonl")
    return path


def test_a_killed_command_leaves_an_interrupted_run_and_no_worker(pareto_studio: Start, data: DataDir) -> None:
    process = pareto_studio(*words(data, "--set", "items=1000"))
    path = wait_for(data, "tokens")
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.kill()
    process.communicate()
    psutil.wait_procs(children, timeout=PATIENCE_S)
    assert not [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE], "the worker stays behind"
    with Store(data) as store:
        store.flush()
        assert [(r.id, r.status) for r in store.experiments()] == [(path.stem, "interrupted")]
        live = tables(store)
        store.rebuild()
        assert tables(store) == live


def test_ctrl_c_keeps_what_was_measured(pareto_studio: Start, data: DataDir, tmp_path: Path) -> None:
    process = pareto_studio(*words(data, "--set", "items=1000", "--json", tmp_path / "out.json"))
    wait_for(data, "output")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "Traceback" not in err
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["experiment"]["status"] == "cancelled"
    assert report["lanes"][0]["outputs"]


# -- the disk


def test_a_disk_that_fills_up_during_a_run(pareto_studio: Start, data: DataDir) -> None:
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))  # noqa: E731
    process = pareto_studio(*words(data, "--set", "items=1000"), preexec_fn=limit)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "it could not be recorded" in err.splitlines()[-1]
    assert "the file may not grow any further" in err.splitlines()[-1]
    [path] = data.spools.glob("*.jsonl")
    events = list(read_spool(path))
    assert len(events) > 3
    assert [e.seq for e in events] == list(range(len(events)))
    code, out, _ = finish(pareto_studio("history", "--json", "--data-dir", data.root))
    [row] = json.loads(out)
    assert code == 0
    assert row["status"] in ("failed", "interrupted"), "failed only if that word still fitted onto the disk"


def finish(process: Any) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in out + err, err
    return process.returncode, out, err


CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24


def without_privilege() -> None:
    """Let permissions bind the administrator too (containers often run tests as root)."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)


def test_a_read_only_data_directory_can_be_read_and_refuses_runs(pareto_studio: Start, data: DataDir) -> None:
    with Store(data):  # leaves a database there
        pass
    folders = [data.root, *(p for p in data.root.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        code, out, err = finish(pareto_studio(*words(data), preexec_fn=without_privilege))
        assert (code, out) == (1, "")
        [line] = err.splitlines()
        assert line.startswith(f"cannot use the data directory {data.root}: it may not be written by this user; ")
        code, out, err = finish(pareto_studio("history", "--json", "--data-dir", data.root, preexec_fn=without_privilege))
        assert (code, out.strip(), err) == (0, "[]", "")
        assert not list(data.spools.iterdir())
    finally:
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_data_directory_that_is_none(place: str, pareto_studio: Start, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    root = file if place == "a file" else file / "data"
    code, out, err = finish(pareto_studio(*words(DataDir.at(root))))
    assert (code, out) == (1, "")
    [line] = err.splitlines()
    assert "is a file, not a folder" in line


# -- two of them


def test_a_second_studio_and_a_database_from_the_future_are_refused(pareto_studio: Start, data: DataDir) -> None:
    with Store(data):
        code, _, err = finish(pareto_studio("--data-dir", data.root))
    assert code == 1
    assert err.splitlines()[-1].startswith(f"another Pareto Studio uses the data directory {data.root}; ")
    with duckdb.connect(str(data.database)) as con:
        con.execute("INSERT INTO migrations VALUES (999, 'later', now()::TIMESTAMP)")
    before = data.database.read_bytes()
    code, _, err = finish(pareto_studio("--data-dir", data.root))
    assert code == 1
    assert "is from a newer Pareto Studio (record version 999" in err.splitlines()[-1]
    assert data.database.read_bytes() == before
    code, out, err = finish(pareto_studio("history", "--json", "--data-dir", data.root))
    assert (code, out.strip()) == (0, "[]"), err
