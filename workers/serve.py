"""The worker's side of the line protocol: requests in on stdin, events out on stdout.

Requests, one JSON object a line::

    {"op": "run", "experiment": ID, "spec": {...}}
    {"op": "cancel", "experiment": ID}
    {"op": "inspect", "request": ID, "model": NAME, "spec": {...} | null}
    {"op": "unload", "request": ID}        (without a request, nothing is said where no model was loaded)
    {"op": "shutdown"}

A small thread reads stdin, so that a cancel arrives while an experiment runs.
"""

from __future__ import annotations

import json
import queue
import threading
import traceback
from collections.abc import Iterable
from typing import IO, Any

from pydantic import ValidationError

from studio_state.errors import SpecError, StudioError
from studio_state.events import TERMINAL, Event, Failed, Hello, ModelLoaded, Note, Phase
from studio_state.experiment import ExperimentSpec
from workers import engine, plan
from workers.environment import environment, pick_device
from workers.host import ModelHost
from workers.methods import Policy, effective
from workers.models.fit import free_memory
from workers.models.zoo import fetch as fetch_zoo


class Writer:
    """Numbers events and writes them, one line each, from any thread."""

    def __init__(self, out: IO[str], experiment: str = "", first: int = 1):
        self.out, self.experiment, self.seq = out, experiment, first
        self.lock = threading.Lock()

    def write(self, event: Event) -> None:
        """Write one event with this writer's experiment and the next number."""
        with self.lock:
            self.out.write(event.model_copy(update={"experiment": self.experiment, "seq": self.seq}).line() + "\n")
            self.out.flush()
            self.seq += 1


class Server:
    """One device, one loaded model, one experiment at a time."""

    def __init__(self, device: str, out: IO[str]):
        self.device, self.out = device, out
        self.host = ModelHost()
        self.requests: queue.Queue[dict[str, Any]] = queue.Queue()
        self.cancelled: set[str] = set()
        self.closed = False

    def loop(self, lines: Iterable[str]) -> None:
        """Say hello, then serve until stdin closes or a shutdown arrives.

        Where the device cannot be used, a failure is told instead of the hello, and nothing is served.
        """
        try:
            hello = self._hello()
        except StudioError as e:
            Writer(self.out, first=0).write(Failed(message=str(e), phase="start"))
            return
        Writer(self.out, first=0).write(hello)
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        while (request := self.requests.get())["op"] != "shutdown":
            self._serve(request)

    def _hello(self) -> Hello:
        torch_device = pick_device(self.device)
        return Hello(
            device=str(torch_device),
            environment=environment(torch_device),
            unavailable=self.host.unavailable(),
            free_bytes=free_memory(str(torch_device)),
        )

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            try:
                request = json.loads(line)
                operation = request["op"]
            except (json.JSONDecodeError, KeyError, TypeError):
                Writer(self.out).write(Note(text=f"the worker cannot read this request: {line.strip()[:200]!r}", level="warning"))
                continue
            if operation == "cancel":
                self.cancelled.add(str(request.get("experiment")))
            else:
                self.requests.put(request)
        self.closed = True  # nobody listens any more: what runs is cancelled between steps
        self.requests.put({"op": "shutdown"})

    def _serve(self, request: dict[str, Any]) -> None:
        if request["op"] == "run":
            self._run(str(request.get("experiment", "")), request.get("spec"))
        elif request["op"] == "inspect":
            self._inspect(request)
        elif request["op"] == "unload":
            self._unload(str(request.get("request", "")))
        else:
            Writer(self.out).write(Note(text=f"the worker knows no operation {request['op']!r}", level="warning"))

    def _run(self, experiment: str, data: Any) -> None:
        writer = Writer(self.out, experiment)
        try:
            spec = ExperimentSpec.model_validate(data)
        except ValidationError as e:
            writer.write(Failed(message=f"this is not an experiment: {e.errors()[0]['msg']}", phase="check"))
            return
        for event in engine.run(spec, self.host, lambda: self.closed or experiment in self.cancelled, writer.write):
            writer.write(event)
        self.cancelled.discard(experiment)

    def _unload(self, name: str) -> None:
        """Drop the model; whoever asked by name is answered also if there was none."""
        if self.host.unload():
            Writer(self.out, name).write(Note(text="the model was unloaded; its memory is free again"))
        elif name:
            Writer(self.out, name).write(Note(text="no model was loaded"))

    def _inspect(self, request: dict[str, Any]) -> None:
        """Answer what a model is and what it needs, without loading it."""
        writer = Writer(self.out, str(request.get("request", "")))
        try:
            data = request.get("spec") or {"workload": {"id": "prompts"}}
            spec = ExperimentSpec.model_validate({**data, "model": request.get("model") or data.get("model")})
            info = self.host.inspect(spec, lambda text, done: writer.write(Phase(name="fetch", done=done, text=text)))
            lanes = lanes_of(spec)
            needs = plan.needs(spec, info, pick_device(spec.device), self.host.companions(lanes, fetch=False))
            writer.write(ModelLoaded(info=info, estimate=needs.told(lanes), fits_baseline=needs.baseline.fits))
        except (StudioError, ValidationError) as e:
            writer.write(Failed(message=str(e), phase="inspect"))
        except Exception as e:
            writer.write(
                Failed(
                    message=f"this model cannot be inspected: {type(e).__name__}: {e}",
                    phase="inspect",
                    detail=traceback.format_exc(),
                )
            )


def lanes_of(spec: ExperimentSpec) -> list[list[Policy]]:
    """The policies of each lane; none at all where a pipeline cannot run as it is, of which the screen tells."""
    try:
        return [effective(pipeline) for pipeline in spec.lanes]
    except SpecError:
        return []


def run_once(spec: str, experiment: str, out: IO[str]) -> int:
    """Run one experiment given as JSON text; exit status 0 only if it finished."""
    writer = Writer(out, experiment)
    try:
        parsed = ExperimentSpec.model_validate_json(spec)
    except ValidationError as e:
        writer.write(Failed(message=f"this is not an experiment: {e.errors()[0]['msg']}", phase="check"))
        return 2
    last = ""
    for event in engine.run(parsed, say=writer.write):
        writer.write(event)
        last = getattr(event, "event", "")
    return 0 if last == TERMINAL[0] else 1


def fetch_model(model: str, out: IO[str]) -> int:
    """Fetch a zoo model; progress as phase events, then a note or a failure."""
    writer = Writer(out)
    try:
        path = fetch_zoo(model, lambda phase, done, text: writer.write(Phase(name="fetch", done=done, text=text or phase)))
    except StudioError as e:
        writer.write(Failed(message=str(e), phase="fetch"))
        return 1
    writer.write(Note(text=f"{model} is ready in {path}"))
    return 0
