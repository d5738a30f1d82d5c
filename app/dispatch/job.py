"""One accepted experiment: its record, its inbox, and whether somebody wants it to stop."""

from __future__ import annotations

import hashlib
import queue
import threading
from typing import Protocol

from app.dispatch.bus import Bus, is_terminal
from app.dispatch.client import WorkerClient
from studio_state.errors import SpecError, StoreError
from studio_state.events import Event, Failed, Phase
from studio_state.experiment import ExperimentSpec
from studio_state.paths import DataDir
from studio_state.spool import SpoolWriter


class EventSink(Protocol):
    """What the dispatcher needs of the store."""

    def append(self, events: list[Event]) -> None:
        """Events that are in their spool; must return at once."""
        ...


class Wake:
    """Put into an inbox to wake its reader: a cancel was asked for."""


class Exit:
    """Put into an inbox after the last event of a worker that ended."""

    def __init__(self, client: WorkerClient):
        self.client = client


def owner_mark(owner: str) -> str:
    """What the record says of an owner: a digest, for who knows the owner's id may cancel."""
    return hashlib.sha256(owner.encode()).hexdigest()[:12] if owner else ""


class Job:
    """Events go to the spool first, then to the store and the bus.

    Where the spool cannot be written (full disk), nothing is published either, and ``lost`` holds the
    reason: the experiment must then be ended.

    Args:
        store: None = nobody indexes (command line).

    Raises:
        StoreError: the spool cannot be written.
    """

    def __init__(self, experiment: str, spec: ExperimentSpec, owner: str, data: DataDir, bus: Bus, store: EventSink | None):
        self.experiment, self.spec, self.owner = experiment, spec, owner
        self.inbox: queue.SimpleQueue[Event | Wake | Exit] = queue.SimpleQueue()
        self.cancelled = threading.Event()
        self.phase = "being started"
        self.ended = False
        self.lost: StoreError | None = None
        self._bus, self._store = bus, store
        self._spool = SpoolWriter(data.spool(experiment))
        self._guard = threading.Lock()

    def record(self, *events: Event) -> None:
        """Write and publish events; those after the terminal one are dropped."""
        with self._guard:
            if self.ended:
                return
            last = next((i for i, e in enumerate(events) if is_terminal(e)), len(events) - 1)
            batch = list(events[: last + 1])
            try:
                batch = self._spool.append_all(batch)
            except StoreError as e:
                self.lost = self.lost or e
                return
            for event in batch:
                if isinstance(event, Phase):
                    self.phase = event.name + (f", lane {event.lane}" if event.lane is not None else "")
            self._publish(batch)

    def _publish(self, batch: list[Event]) -> None:
        """To the store and the bus; who sees the terminal event finds the spool closed."""
        if batch and is_terminal(batch[-1]):
            self.ended = True
            self._spool.close()
        if self._store is not None and self.lost is None:
            self._store.append(batch)
        self._bus.publish(batch)

    def fail(self, error: Exception | str, detail: str = "") -> None:
        """End with an error; the sentence is the error's own. It is published even where it cannot be recorded."""
        found = [p.model_dump(mode="json") for p in error.problems] if isinstance(error, SpecError) else []
        event = Failed(experiment=self.experiment, message=str(error), phase=self.phase, problems=found, detail=detail)
        self.record(event)
        with self._guard:
            if not self.ended:
                self._publish([event.model_copy(update={"seq": self._spool.next_seq})])

    def abandon(self) -> None:
        """Let the record go without an end (it could not be accepted)."""
        self._spool.close()

    def stop(self) -> None:
        """Ask for a cancel."""
        self.cancelled.set()
        self.inbox.put(Wake())
