"""The worker as a real process: the line protocol, the protected stdout, cancel, inspect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_state.events import Event, Hello, ModelLoaded, Tokens, decode


class Worker:
    """A real worker process and its two streams."""

    def __init__(self, *command: str) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *(command or ("-m", "workers", "serve"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )

    def ask(self, **request: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Event:
        assert self.process.stdout
        return decode(self.process.stdout.readline())

    def until(self, *kinds: str) -> list[Event]:
        seen = [self.hear()]
        while seen[-1].event not in kinds:
            seen.append(self.hear())
        return seen


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    w = Worker()
    assert isinstance(w.hear(), Hello)
    yield w
    w.ask(op="shutdown")
    assert w.process.wait(20) == 0


def spec(model: Path, **more: Any) -> dict[str, Any]:
    workload = {"id": "prompts", "options": {"text": "A prompt of some words about rivers and trees."}}
    return {"model": str(model), "workload": workload, "threads": 1, "max_new_tokens": 4, "chat_template": False, **more}


def test_two_experiments_in_a_row_on_one_worker(worker: Worker, tiny_llama: Path) -> None:
    for name in ("one", "two"):
        worker.ask(op="run", experiment=name, spec=spec(tiny_llama))
        events = worker.until("finished", "failed")
        assert events[-1].event == "finished"
        assert {e.experiment for e in events} == {name}
        assert [e.seq for e in events] == list(range(1, len(events) + 1))


def test_cancel_while_running(worker: Worker, tiny_llama: Path) -> None:
    worker.ask(op="run", experiment="long", spec=spec(tiny_llama, max_new_tokens=1500, eos="ignore"))
    worker.until("tokens")
    worker.ask(op="cancel", experiment="long")
    events = worker.until("cancelled", "finished", "failed")
    assert events[-1].event == "cancelled"
    assert sum(len(e.ids) for e in events if isinstance(e, Tokens)) < 1500
    worker.ask(op="run", experiment="after", spec=spec(tiny_llama))
    assert worker.until("finished", "failed")[-1].event == "finished"


def test_inspect_answers_without_loading(worker: Worker, tiny_llama: Path) -> None:
    worker.ask(op="inspect", request="q1", model=str(tiny_llama), spec=None)
    answer = worker.until("model", "failed")[-1]
    assert isinstance(answer, ModelLoaded)
    assert answer.experiment == "q1"
    assert answer.info.family == "llm"
    assert answer.estimate
    assert answer.estimate.weight_bytes > 0
    worker.ask(op="inspect", request="q2", model="no-such-model-here", spec=None)
    failed = worker.until("model", "failed")[-1]
    assert failed.event == "failed"
    assert "no-such-model-here" in failed.message


def test_requests_that_cannot_be_read(worker: Worker) -> None:
    assert worker.process.stdin
    worker.process.stdin.write("this is no request\n")
    worker.process.stdin.flush()
    assert "cannot read" in worker.until("note")[-1].text
    worker.ask(op="dance")
    assert "dance" in worker.until("note")[-1].text
    worker.ask(op="run", experiment="bad", spec={"model": "x"})
    assert worker.until("failed")[-1].experiment == "bad"


def test_prints_of_libraries_do_not_reach_the_stream() -> None:
    noisy = (
        "import os, sys, workers.__main__ as m\n"
        "out = m.event_stream()\n"
        "print('from python'); os.system('echo from a child'); os.write(1, b'from C\\n')\n"
        'out.write(\'{"event":"note","text":"ok"}\\n\')\n'
    )
    w = Worker("-c", noisy)
    out, err = w.process.communicate(timeout=60)
    assert out == '{"event":"note","text":"ok"}\n'
    assert {"from python", "from a child", "from C"} <= set(err.split("\n"))


def test_isolated_lanes_run_in_processes_of_their_own(tiny_llama: Path) -> None:
    lanes = [{"steps": []}, {"steps": [{"policy": "knorm"}]}, {"steps": [{"policy": "snapkv", "knobs": {"window": 4}}]}]
    done = subprocess.run(
        [sys.executable, "-m", "workers", "run", "-"],
        input=json.dumps(spec(tiny_llama, isolate=True, lanes=lanes)),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    events = [decode(line) for line in done.stdout.splitlines()]
    assert [e.lane for e in events if e.event == "lane_finished"] == [0, 1, 2]
    assert {e.lane for e in events if e.event == "ratio"} == {1, 2}
    assert [e.event for e in events].count("started") == 1
    assert events[-1].event == "finished"


def test_unload_is_answered_by_name(worker: Worker, tiny_llama: Path) -> None:
    worker.ask(op="run", experiment="before", spec=spec(tiny_llama))
    worker.until("finished", "failed")
    for said in ("the model was unloaded; its memory is free again", "no model was loaded"):
        worker.ask(op="unload", request="r")
        [note] = worker.until("note")
        assert (note.experiment, getattr(note, "text", "")) == ("r", said)
    worker.ask(op="run", experiment="after", spec=spec(tiny_llama))
    events = worker.until("finished", "failed")
    assert events[-1].event == "finished"
    assert any(e.event == "phase" and getattr(e, "name", "") == "load" for e in events)  # it was loaded again
