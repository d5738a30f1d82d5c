"""A hosted studio's bounds on time and downloads, with real processes: a worker that replays, a Hub on localhost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.dispatch.local import LocalDispatch
from app.dispatch.runner import Settings
from app.hosted import HostedLimits
from studio_state.errors import DeviceBusy
from studio_state.events import Cancelled, Event, Finished, Note
from studio_state.experiment import ExperimentSpec
from studio_state.paths import DataDir
from tests import tiny

ROOT = Path(__file__).parents[2]
REPLAY = Path(__file__).with_name("replay_worker.py")


@pytest.fixture
def dispatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalDispatch]:
    monkeypatch.setenv("PARETO_STUDIO_LOCKS", str(tmp_path / "locks"))
    settings = Settings(command=lambda device: [sys.executable, str(REPLAY), str(tmp_path / "pids")], grace_s=0.3)
    limits = HostedLimits(minutes=1 / 60, waiting=2, waiting_each=1)
    with LocalDispatch(DataDir.at(tmp_path / "data").open(), settings=limits.settings(settings)) as found:
        yield found


def asked(model: str) -> ExperimentSpec:
    return ExperimentSpec.model_validate({"model": model, "workload": {"id": "speed"}})


def ended(dispatch: LocalDispatch, experiment: str) -> list[Event]:
    return list(dispatch.follow(experiment, timeout=30))


def test_an_experiment_that_takes_too_long_is_stopped_and_the_next_one_runs(dispatch: LocalDispatch) -> None:
    long, short = dispatch.submit(asked("steps=100000-slow"), "a"), dispatch.submit(asked("steps=4"), "b")
    events = ended(dispatch, long)
    assert isinstance(events[-1], Cancelled)
    text = "stopped: an experiment may take at most 0.0167 min here; what was measured before is kept"
    assert [e.text for e in events if isinstance(e, Note) and e.level == "warning"] == [text]
    after = ended(dispatch, short)
    assert isinstance(after[-1], Finished)
    assert not [e for e in after if isinstance(e, Note) and "stopped" in e.text]


def test_few_may_wait(dispatch: LocalDispatch) -> None:
    dispatch.submit(asked("steps=100000-slow"), "a")
    while dispatch.status()[0].running is None:
        time.sleep(0.01)
    dispatch.submit(asked("steps=4"), "a")
    with pytest.raises(DeviceBusy, match="1 of your experiments already wait"):
        dispatch.submit(asked("steps=4"), "a")
    dispatch.submit(asked("steps=4"), "b")
    with pytest.raises(DeviceBusy, match="the queue is full"):
        dispatch.submit(asked("steps=4"), "c")


def test_a_model_of_the_hub_is_fetched_up_to_a_size(tmp_path: Path) -> None:
    served = tmp_path / "served" / "org" / "good"
    shutil.copytree(tiny.llama_folder(), served)
    needed = sum(p.stat().st_size for p in served.iterdir())
    (served / "more.bin").write_bytes(bytes(100_000))  # never fetched, so it does not count
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "hub_server.py"), str(tmp_path / "served")], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    endpoint = f"http://127.0.0.1:{server.stdout.readline().strip()}"
    script = (
        "import json, os\nfrom studio_state.errors import ModelError\nfrom workers.models.hub import download\n"
        "out = []\n"
        f"for limit in ({needed - 1}, {needed}, 1):\n"  # what is here already is not fetched again
        "    os.environ['PARETO_STUDIO_MAX_DOWNLOAD'] = str(limit)\n"
        "    try: out.append(sorted(p.name for p in download('org/good')[0].iterdir()))\n"
        "    except ModelError as e: out.append(str(e))\n"
        "print(json.dumps(out))\n"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    try:
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    assert done.returncode == 0, done.stderr[-2000:]
    refused, fetched, again = json.loads(done.stdout.splitlines()[-1])
    assert refused.startswith("org/good is a download of ")
    assert refused.endswith("are allowed here; choose a smaller model, or run the studio on your own machine")
    assert "model.safetensors" in fetched
    assert "more.bin" not in fetched
    assert again == fetched
