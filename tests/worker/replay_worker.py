"""A worker that replays a small event stream over the real line protocol, without a model.

What it does is chosen by the model's name in the spec: words joined by ``-``. ``steps=N`` items,
``slow`` (a pause per step), ``deaf`` (ignores cancel and SIGTERM), ``garbage`` (writes lines that are no events),
``crash`` (ends with status 3 after half of the steps), ``torn`` (half a line, then SIGKILL of itself).
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path

from studio_state.events import (
    Cancelled,
    Event,
    Failed,
    Finished,
    Hello,
    ItemStarted,
    LaneFinished,
    LaneStarted,
    Metric,
    ModelLoaded,
    Note,
    Phase,
    Started,
)
from studio_state.experiment import ModelInfo

cancelled: set[str] = set()
requests: queue.Queue[dict] = queue.Queue()


def say(experiment: str, event: Event) -> None:
    sys.stdout.write(event.model_copy(update={"experiment": experiment}).line() + "\n")
    sys.stdout.flush()


def read() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "cancel":
            cancelled.add(request["experiment"])
        else:
            requests.put(request)
    requests.put({"op": "shutdown"})


def run(experiment: str, spec: dict) -> None:
    words = spec["model"].split("-")
    steps = next((int(w.partition("=")[2]) for w in words if w.startswith("steps=")), 4)
    if "deaf" in words:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say(experiment, Started(environment={"pid": os.getpid()}))
    for lane in range(len(spec["lanes"])):
        say(experiment, LaneStarted(lane=lane, order="baseline" if lane == 0 else "x"))
    for step in range(steps):
        if experiment in cancelled and "deaf" not in words:
            say(experiment, Cancelled())
            return
        if "garbage" in words:
            sys.stdout.write('Loading weights: 100%|####|\n\x00\xff{"event": \n[1,2]\n')
        if "crash" in words and step == steps // 2:
            print("RuntimeError: the device is on fire", file=sys.stderr)
            sys.stderr.flush()
            os._exit(3)
        if "torn" in words and step == steps // 2:
            sys.stdout.write('{"event": "metric", "lane": 0, "na')
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        say(experiment, Phase(name="run", lane=0, done=step / steps))
        say(experiment, ItemStarted(lane=0, item=str(step), index=step, of=steps))
        say(experiment, Metric(lane=0, name="new_tokens", value=step, item=str(step)))
        if "slow" in words:
            time.sleep(0.01)
    for lane in range(len(spec["lanes"])):
        say(experiment, LaneFinished(lane=lane, status="finished"))
    say(experiment, Finished(seconds=0.0))


def main() -> None:
    if len(sys.argv) > 1:
        with Path(sys.argv[1]).open("a") as f:
            f.write(f"{os.getpid()}\n")
    say("", Hello(device="cpu", unavailable={"nothing": "a test"}))
    threading.Thread(target=read, daemon=True).start()
    while (request := requests.get())["op"] != "shutdown":
        if request["op"] == "run":
            run(request["experiment"], request["spec"])
        elif request["op"] == "unload":
            say(request.get("request", ""), Note(text="the model was unloaded"))
        elif request["op"] == "inspect":
            name = request["request"]
            say(name, Phase(name="fetch", done=0.5))
            if request["model"] == "nowhere":
                say(name, Failed(message="there is no model 'nowhere'; give a zoo id, a Hub id or a folder"))
            else:
                say(name, ModelLoaded(info=ModelInfo(name=request["model"], family="llm", layers=2)))


if __name__ == "__main__":
    main()
