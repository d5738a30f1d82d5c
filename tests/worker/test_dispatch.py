"""The dispatcher with real processes, real pipes and real spools; the worker replays a small event stream."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.dispatch.device_lock import DeviceLock
from app.dispatch.fair_queue import FairQueue
from app.dispatch.local import LocalDispatch
from app.dispatch.runner import Settings
from app.dispatch.worker_log import WorkerLog
from app.live import Races
from studio_state.errors import DeviceBusy, ModelError, SpecError, StoreError, StudioError, WorkerLost
from studio_state.events import Cancelled, Event, Failed, Finished, Metric, Note, Submitted
from studio_state.experiment import ExperimentSpec
from studio_state.paths import DataDir
from studio_state.spool import is_alive, read_spool

REPLAY = Path(__file__).with_name("replay_worker.py")
ROOT = Path(__file__).parents[2]
PATIENCE_S = 30


def spec(model: str = "steps=4", device: str = "cpu") -> ExperimentSpec:
    return ExperimentSpec.model_validate(
        {"model": model, "workload": {"id": "speed"}, "device": device, "lanes": [{}, {"steps": [{"policy": "x"}]}]}
    )


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETO_STUDIO_LOCKS", str(tmp_path / "locks"))


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return DataDir.at(tmp_path / "data").open()


@pytest.fixture
def pids(tmp_path: Path) -> Path:
    return tmp_path / "pids"


@pytest.fixture
def start(data: DataDir, pids: Path) -> Iterator[Callable[..., LocalDispatch]]:
    opened: list[LocalDispatch] = []

    def make(devices: tuple[str, ...] = ("cpu",), store=None, folder: DataDir = data, **settings: object) -> LocalDispatch:
        command = lambda device: [sys.executable, str(REPLAY), str(pids)]  # noqa: E731
        dispatch = LocalDispatch(folder, devices, store, Settings(**{"command": command, "grace_s": 0.3, **settings}))
        opened.append(dispatch)
        return dispatch

    yield make
    for dispatch in opened:
        dispatch.close()


def finish(dispatch: LocalDispatch, experiment: str) -> list[Event]:
    events = list(dispatch.follow(experiment, timeout=PATIENCE_S))
    assert events[-1].event in ("finished", "failed", "cancelled"), events[-3:]
    return events


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def running(dispatch: LocalDispatch, experiment: str) -> None:
    until(lambda: any(isinstance(e, Metric) for e in dispatch.since(experiment)), "the experiment did not begin")


# -- the queue


def test_owners_take_turns_and_each_keeps_its_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for owner, item in [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2")]:
        queue.put(owner, item)
    assert queue.order() == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert [queue.get(0) for _ in range(2)] == ["a1", "b1"]
    queue.put("d", "d1")
    assert queue.order() == ["c1", "a2", "b2", "d1", "a3"]
    assert queue.remove("a2")
    assert not queue.remove("a2")
    assert [queue.get(0) for _ in range(len(queue))] == ["c1", "a3", "b2", "d1"]
    assert queue.get(0) is None


def test_the_queue_is_bounded_in_all_and_per_owner() -> None:
    queue: FairQueue[int] = FairQueue(limit=3, owner_limit=2)
    queue.put("a", 1)
    queue.put("a", 2)
    with pytest.raises(DeviceBusy, match="2 of your experiments already wait"):
        queue.put("a", 3)
    queue.put("b", 4)
    with pytest.raises(DeviceBusy, match="the queue is full"):
        queue.put("c", 5)
    assert queue.close() == [1, 4, 2]
    with pytest.raises(DeviceBusy, match="closing"):
        queue.put("a", 6)


# -- an experiment from end to end


def test_every_event_is_in_the_spool_the_store_and_the_bus(start, data: DataDir, pids: Path) -> None:
    class Kept:
        def __init__(self) -> None:
            self.events: list[Event] = []

        def append(self, events: list[Event]) -> None:
            self.events += events

    store, woken = Kept(), []
    dispatch = start(store=store)
    dispatch.listen(woken.append)
    first = dispatch.submit(spec(), owner="somebody's secret")
    events = finish(dispatch, first)
    assert [e.seq for e in events] == list(range(len(events)))
    assert isinstance(events[0], Submitted)
    assert isinstance(events[-1], Finished)
    assert [e.value for e in events if isinstance(e, Metric)] == [0, 1, 2, 3]
    assert list(read_spool(data.spool(first))) == events == store.events
    assert set(woken) == {first}
    assert "somebody's secret" not in data.spool(first).read_text()
    assert not is_alive(data.spool(first))
    assert dispatch.since(first, 5) == events[5:]
    assert list(dispatch.follow(first, 5)) == events[5:]
    finish(dispatch, dispatch.submit(spec()))
    assert len(pids.read_text().split()) == 1, "the worker was not kept warm"
    until(lambda: dispatch.status()[0].state == "idle", "the device stays busy")
    [status] = dispatch.status()
    assert (status.running, status.queued) == (None, 0)
    assert status.hello is not None
    assert status.hello.unavailable == {"nothing": "a test"}


def test_two_owners_alternate_on_one_device(start) -> None:
    dispatch = start()
    gate = dispatch.submit(spec("steps=1000-slow"), owner="z")
    running(dispatch, gate)
    ids = {name: dispatch.submit(spec("steps=1"), owner=name[0]) for name in ("a1", "a2", "a3", "b1", "b2", "c1")}
    assert {n: dispatch.place(i) for n, i in ids.items()} == {"a1": 1, "b1": 2, "c1": 3, "a2": 4, "b2": 5, "a3": 6}
    assert dispatch.place(gate) == 0
    dispatch.cancel(gate, dispatch.host_token)
    ended = {n: finish(dispatch, i)[-1].t for n, i in ids.items()}
    assert sorted(ended, key=ended.__getitem__) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert dispatch.place(gate) is None


def test_an_end_that_is_written_but_not_yet_told_is_no_interruption(start, data: DataDir) -> None:
    seen: list[tuple[bool, str]] = []

    class Looks:
        """Looks at the experiment between the spool, which is closed by its last event, and the bus."""

        def append(self, events: list[Event]) -> None:
            experiment = events[0].experiment
            gone = lambda e: dispatch.place(e) is None and not is_alive(data.spool(e))  # noqa: E731
            if race := Races(dispatch.since, dispatch.place, list, gone).get(experiment):
                seen.append((is_alive(data.spool(experiment)), race.status))

    dispatch = start(store=Looks())
    experiment = dispatch.submit(spec("steps=1"))
    finish(dispatch, experiment)
    assert seen[-1] == (False, "running")
    assert dispatch.place(experiment) is None


def test_an_unknown_device_is_refused_before_anything_is_recorded(start, data: DataDir) -> None:
    with pytest.raises(SpecError, match=r"device 'cuda:7' is not served here; allowed: cpu"):
        start().submit(spec(device="cuda:7"))
    assert not list(data.spools.iterdir())


# -- cancel


def test_cancel_is_heeded_by_the_worker_which_lives_on(start, pids: Path) -> None:
    dispatch = start()
    experiment = dispatch.submit(spec("steps=100000-slow"), owner="me")
    running(dispatch, experiment)
    dispatch.cancel(experiment, dispatch.cancel_token(experiment, "me"))
    events = finish(dispatch, experiment)
    assert isinstance(events[-1], Cancelled)
    assert events[-1].message == "cancelled"
    assert isinstance(finish(dispatch, dispatch.submit(spec()))[-1], Finished)
    assert len(pids.read_text().split()) == 1


def test_a_deaf_worker_is_ended_and_replaced(start, pids: Path) -> None:
    dispatch = start()
    experiment = dispatch.submit(spec("steps=100000-slow-deaf"))
    running(dispatch, experiment)
    dispatch.cancel(experiment, dispatch.host_token)
    events = finish(dispatch, experiment)
    assert isinstance(events[-1], Cancelled)
    assert "did not stop within 0.3 s" in events[-1].message
    assert isinstance(finish(dispatch, dispatch.submit(spec()))[-1], Finished)
    old, new = map(int, pids.read_text().split())
    assert old != new
    with pytest.raises(ProcessLookupError):
        os.kill(old, 0)


def test_only_the_owner_or_the_host_cancels(start) -> None:
    dispatch = start()
    experiment = dispatch.submit(spec("steps=100000-slow"), owner="me")
    with pytest.raises(StudioError, match="somebody else"):
        dispatch.cancel_token(experiment, "you")
    with pytest.raises(StudioError, match="does not cancel"):
        dispatch.cancel(experiment, "guess")
    other = dispatch.submit(spec(), owner="you")
    with pytest.raises(StudioError, match="does not cancel"):
        dispatch.cancel(experiment, dispatch.cancel_token(other, "you"))
    dispatch.cancel(other, dispatch.cancel_token(other, "you"))
    assert finish(dispatch, other)[-1].message == "cancelled before it began"
    token = dispatch.cancel_token(experiment, "me")
    assert token == dispatch.cancel_token(experiment, "me"), "a reload must get the same token"
    dispatch.cancel(experiment, token)
    assert isinstance(finish(dispatch, experiment)[-1], Cancelled)
    dispatch.cancel(experiment, token)  # too late is no error


def test_closing_ends_what_runs_and_what_waits(start, data: DataDir, pids: Path) -> None:
    dispatch = start()
    ids = [dispatch.submit(spec("steps=100000-slow")) for _ in range(3)]
    running(dispatch, ids[0])
    dispatch.close()
    assert [list(read_spool(data.spool(i)))[-1].event for i in ids] == ["cancelled"] * 3
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids.read_text()), 0)


# -- workers that fail


def test_a_worker_killed_at_random_points_loses_nothing(start, data: DataDir, pids: Path) -> None:
    dispatch, rng = start(), random.Random(7)
    for _ in range(20):
        experiment = dispatch.submit(spec("steps=400-slow"))
        target = rng.randint(0, 60)
        until(lambda e=experiment, n=target: len(dispatch.since(e)) > n + 4, "no events")
        os.kill(int(pids.read_text().split()[-1]), signal.SIGKILL)
        events = finish(dispatch, experiment)
        assert isinstance(events[-1], Failed)
        assert "ended by SIGKILL" in events[-1].message
        assert "out of memory" in events[-1].message
        assert [e.seq for e in events] == list(range(len(events)))
        assert list(read_spool(data.spool(experiment))) == events
        values = [e.value for e in events if isinstance(e, Metric)]
        assert values == list(range(len(values)))
    assert isinstance(finish(dispatch, dispatch.submit(spec()))[-1], Finished)
    assert len(set(pids.read_text().split())) == 21


def test_a_crash_is_told_with_the_worker_s_last_words(start, data: DataDir) -> None:
    dispatch = start()
    events = finish(dispatch, dispatch.submit(spec("steps=8-crash")))
    failed = events[-1]
    assert isinstance(failed, Failed)
    assert "exit status 3" in failed.message
    assert "the device is on fire" in failed.message
    assert "phase: run, lane 0" in failed.message
    assert "the device is on fire" in (data.root / "logs" / "worker-cpu.log").read_text()
    assert [e.value for e in events if isinstance(e, Metric)] == [0, 1, 2, 3]


def test_garbage_and_torn_lines_become_notes(start) -> None:
    dispatch = start()
    events = finish(dispatch, dispatch.submit(spec("steps=3-garbage")))
    notes = [e.text for e in events if isinstance(e, Note) and e.level == "warning"]
    assert len(notes) == 9
    assert isinstance(events[-1], Finished)
    assert [e.value for e in events if isinstance(e, Metric)] == [0, 1, 2]
    torn = finish(dispatch, dispatch.submit(spec("steps=4-torn")))
    assert isinstance(torn[-1], Failed)
    assert [e.value for e in torn if isinstance(e, Metric)] == [0, 1]


def test_a_worker_that_cannot_start_fails_the_experiment(start) -> None:
    dispatch = start(command=lambda device: [sys.executable, "-c", "raise SystemExit('no torch here')"])
    failed = finish(dispatch, dispatch.submit(spec()))[-1]
    assert isinstance(failed, Failed)
    assert "while it was starting" in failed.message
    assert "no torch here" in failed.message
    missing = start(("cuda:0",), command=lambda device: ["/nowhere/python"])
    failed = finish(missing, missing.submit(spec(device="cuda:0")))[-1]
    assert isinstance(failed, Failed)
    assert "cannot be started" in failed.message


def test_a_silent_worker_is_given_up(start) -> None:
    dispatch = start(command=lambda device: [sys.executable, "-c", "import time; time.sleep(600)"], start_s=0.3)
    failed = finish(dispatch, dispatch.submit(spec()))[-1]
    assert isinstance(failed, Failed)
    assert "did not start within 0.3 s" in failed.message


def test_a_folder_that_cannot_be_written_refuses_the_experiment(start, data: DataDir) -> None:
    dispatch = start()
    data.spools.rmdir()
    data.spools.write_text("a file stands where the spools should be")
    with pytest.raises(StoreError, match="cannot write the record"):
        dispatch.submit(spec())


FULL = """
import resource, sys
from app.dispatch.local import LocalDispatch
from app.dispatch.runner import Settings
from studio_state.experiment import ExperimentSpec
from studio_state.paths import DataDir
data, worker = sys.argv[1:]
spec = ExperimentSpec.model_validate({"model": "slow-steps=100000", "workload": {"id": "speed"}})  # slow: several small batches before the limit
with LocalDispatch(DataDir.at(data).open(), settings=Settings(command=lambda device: [sys.executable, worker])) as dispatch:
    dispatch.warm()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    experiment = dispatch.submit(spec)
    last = list(dispatch.follow(experiment, timeout=30))[-1]
    print(experiment, last.event, last.message)
"""


def test_a_disk_that_fills_up_ends_the_experiment_with_a_sentence(data: DataDir) -> None:
    command = [sys.executable, "-c", FULL, str(data.root), str(REPLAY)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stderr
    experiment, event, message = done.stdout.split(maxsplit=2)
    assert event == "failed"
    assert "it could not be recorded" in message
    assert "may not grow any further" in message
    values = [e.value for e in read_spool(data.spool(experiment)) if isinstance(e, Metric)]
    assert values
    assert values == list(range(len(values)))


# -- looking at a model


def test_inspect_answers_refuses_and_survives_a_dead_worker(start, pids: Path) -> None:
    dispatch = start()
    assert dispatch.inspect("tiny", spec()).info.layers == 2
    with pytest.raises(ModelError, match="there is no model 'nowhere'"):
        dispatch.inspect("nowhere")
    experiment = dispatch.submit(spec("steps=100000-slow"))
    running(dispatch, experiment)
    with pytest.raises(WorkerLost, match="did not answer within"):
        dispatch.inspect("tiny", timeout=0.1)
    dispatch.cancel(experiment, dispatch.host_token)
    finish(dispatch, experiment)
    os.kill(int(pids.read_text().split()[-1]), signal.SIGKILL)
    until(lambda: dispatch.status()[0].hello is None, "the death went unnoticed")
    assert dispatch.inspect("tiny").info.name == "tiny"


def test_unload_is_answered_refused_while_busy_and_needs_no_worker(start, pids: Path) -> None:
    dispatch = start()
    assert dispatch.unload() == "no model was loaded"
    assert not pids.exists()  # no worker was started for that
    finish(dispatch, dispatch.submit(spec()))
    until(lambda: dispatch.status()[0].running is None, "the device stays busy")
    assert dispatch.unload("cpu") == "the model was unloaded"
    experiment = dispatch.submit(spec("steps=100000-slow"))
    running(dispatch, experiment)
    with pytest.raises(DeviceBusy, match="device cpu has an experiment in hand"):
        dispatch.unload()
    dispatch.cancel(experiment, dispatch.host_token)
    finish(dispatch, experiment)
    with pytest.raises(SpecError, match="device 'cuda:7' is not served here"):
        dispatch.unload("cuda:7")


# -- the device


HOLD = """
import sys
from app.dispatch.device_lock import DeviceLock
lock = DeviceLock("cpu")
assert lock.acquire(5, "20260101-000000-abcdef")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=-1, stdout=-1, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_data_directories_share_one_device(start, tmp_path: Path) -> None:
    one, two = start(), start(folder=DataDir.at(tmp_path / "other").open())
    first = one.submit(spec("steps=100000-slow"))
    running(one, first)
    second = two.submit(spec())
    until(lambda: two.status()[0].state == "waiting", "it did not wait")
    assert first in two.status()[0].message
    one.cancel(first, one.host_token)
    events = finish(two, second)
    assert isinstance(events[-1], Finished)
    assert any(isinstance(e, Note) and first in e.text for e in events)


def test_a_device_of_another_process_is_waited_for_until_it_dies(start, holder: subprocess.Popen[str]) -> None:
    dispatch = start()
    experiment = dispatch.submit(spec())
    until(lambda: dispatch.status()[0].state == "waiting", "it did not wait")
    assert f"process {holder.pid} (experiment 20260101-000000-abcdef)" in dispatch.status()[0].message
    holder.kill()
    assert isinstance(finish(dispatch, experiment)[-1], Finished)


def test_a_taken_device_is_refused_without_waiting(start, data: DataDir, holder: subprocess.Popen[str]) -> None:
    dispatch = start(wait_for_device=False)
    with pytest.raises(DeviceBusy, match=f"in use by process {holder.pid}.*--no-wait"):
        dispatch.submit(spec())
    assert not list(data.spools.iterdir())


def test_waiting_can_be_cancelled(start, holder: subprocess.Popen[str]) -> None:
    dispatch = start()
    experiment = dispatch.submit(spec())
    until(lambda: dispatch.status()[0].state == "waiting", "it did not wait")
    dispatch.cancel(experiment, dispatch.host_token)
    assert finish(dispatch, experiment)[-1].message == "cancelled before it began"


def test_cuda_and_cuda_0_are_one_device() -> None:
    one, two = DeviceLock("cuda"), DeviceLock("cuda:0")
    assert one.acquire(0, "x")
    assert not two.acquire(0)
    assert DeviceLock("cuda:1").acquire(0)
    one.release()
    assert two.acquire(0)
    two.release()


def test_the_worker_log_is_bounded(tmp_path: Path) -> None:
    worker_log = WorkerLog(tmp_path / "logs" / "w.log", limit=1000, lines=3)
    for i in range(200):
        worker_log.write(b"line %d\n" % i)
    assert sorted(p.name for p in (tmp_path / "logs").iterdir()) == ["w.log", "w.log.1"]
    assert all(p.stat().st_size <= 1000 for p in (tmp_path / "logs").iterdir())
    assert worker_log.tail() == "line 197\nline 198\nline 199"
    assert worker_log.last() == "line 199"
