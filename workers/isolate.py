"""``--isolate``: every lane races the baseline in a worker process of its own.

Each child runs the baseline and one lane; its events are passed on under the lane's number. The
baseline of the first child stands for lane 0; every ratio comes from the child's own pair.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

from studio_state.errors import WorkerLost
from studio_state.events import Event, Failed, Finished, decode
from studio_state.experiment import ExperimentSpec
from workers.session import Cancelled

_ONCE = {"started", "model"}


def run_isolated(spec: ExperimentSpec, is_cancelled: Callable[[], bool]) -> Iterator[Event]:
    """Events of all children in turn, as if one worker had run them.

    Raises:
        Cancelled: the person asked to stop; the running child was ended.
        WorkerLost: a child died.
    """
    seconds, told = 0.0, False
    for number, lane in enumerate(spec.lanes[1:], start=1):
        part = spec.model_copy(update={"isolate": False, "lanes": (spec.lanes[0], lane), "reference": 0})
        for event in _child(part, is_cancelled):
            if isinstance(event, Finished):
                seconds += event.seconds
                continue
            if isinstance(event, Failed):
                yield event
                return
            of_lane = getattr(event, "lane", None)
            if (number > 1 and of_lane == 0) or (told and getattr(event, "event", "") in _ONCE):
                continue
            yield event.model_copy(update={"lane": number}) if of_lane == 1 else event
        told = True
    yield Finished(seconds=seconds)


def _child(spec: ExperimentSpec, is_cancelled: Callable[[], bool]) -> Iterator[Event]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "workers", "run", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if process.stdin is None or process.stdout is None:
        raise WorkerLost("the isolated worker could not be started")
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            if is_cancelled():
                process.terminate()
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        process.stdin.write(spec.model_dump_json())
        process.stdin.close()
        ended = False
        for line in process.stdout:
            event = decode(line)
            ended = ended or isinstance(event, Finished | Failed)
            yield event
        code = process.wait()
    finally:
        done.set()
        if process.poll() is None:
            process.terminate()
            process.wait()
    if is_cancelled():
        raise Cancelled
    if not ended:
        raise WorkerLost(f"the isolated worker of lane {spec.lanes[-1].text()!r} ended with status {code} before its run did")
