"""The event bus inside the process: who joins late reads from ``seq`` on, who reads slowly holds up nobody."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from studio_state.events import TERMINAL, Event, Output, Preview
from studio_state.paths import DataDir
from studio_state.spool import read_spool

log = logging.getLogger(__name__)


def is_terminal(event: Event) -> bool:
    """True if the event ends its experiment."""
    return getattr(event, "event", "") in TERMINAL


class Bus:
    """Events of running and recent experiments in memory; those of older ones come from their spools.

    Readers keep their own place, so publishing is an append and a wake-up, whatever they do.
    Of the looks at one picture on its way only the newest keeps its data: eight a picture would fill the memory.

    Args:
        data: where the spools lie.
        keep: ended experiments held in memory.
    """

    def __init__(self, data: DataDir, keep: int = 16):
        self._data, self._keep = data, keep
        self._logs: dict[str, list[Event]] = {}
        self._looks: dict[str, dict[tuple[int, str], int]] = {}  # experiment -> (lane, item) -> seq of the newest look
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._listeners: list[Callable[[str], None]] = []
        self._changed = threading.Condition()

    def publish(self, events: Sequence[Event]) -> None:
        """Append events of one experiment, numbered without gaps from 0."""
        if not events:
            return
        experiment = events[0].experiment
        with self._changed:
            self._logs.setdefault(experiment, []).extend(events)
            self._forget_looks(experiment, events)
            if is_terminal(events[-1]):
                self._ended[experiment] = None
                self._looks.pop(experiment, None)
                while len(self._ended) > self._keep:
                    del self._logs[self._ended.popitem(last=False)[0]]
            self._changed.notify_all()
            listeners = list(self._listeners)
        for wake in listeners:
            try:
                wake(experiment)
            except Exception:  # a closed event loop of a browser tab must not end an experiment
                log.exception("a listener failed and is dropped")
                self._drop(wake)

    def _forget_looks(self, experiment: str, events: Sequence[Event]) -> None:
        """Drop the data of looks that a newer one, or the picture itself, takes the place of."""
        log, looks = self._logs[experiment], self._looks.setdefault(experiment, {})
        for event in events:
            if isinstance(event, Preview | Output):
                old = looks.pop((event.lane, event.item), None)
                if old is not None:
                    log[old] = log[old].model_copy(update={"data": ""})
            if isinstance(event, Preview):
                looks[event.lane, event.item] = event.seq

    def since(self, experiment: str, seq: int = 0) -> list[Event]:
        """Events with ``seq`` or later that are there now."""
        with self._changed:
            if experiment in self._logs:
                return self._logs[experiment][max(seq, 0) :]
        return list(read_spool(self._data.spool(experiment), since=max(seq, 0)))

    def is_over(self, experiment: str) -> bool:
        """True once the last event can be read: there is none to wait for."""
        with self._changed:
            return experiment in self._ended or experiment not in self._logs

    def follow(self, experiment: str, seq: int = 0, timeout: float | None = None) -> Iterator[Event]:
        """Events from ``seq`` on as they come, until a terminal one, or until nothing came for ``timeout`` seconds.

        An experiment that is not in memory (older, or of another process) is read from its spool once.
        """
        while True:
            with self._changed:
                live = experiment in self._logs
                if live and not self._changed.wait_for(lambda start=seq: self._ready(experiment, start), timeout):  # type: ignore[misc]
                    return
            batch = self.since(experiment, seq)
            yield from batch
            if not live or not batch or is_terminal(batch[-1]):
                return
            seq = batch[-1].seq + 1

    def _ready(self, experiment: str, seq: int) -> bool:
        """True if a reader at ``seq`` has something to read or nothing to wait for."""
        return experiment in self._ended or len(self._logs.get(experiment, ())) > seq or experiment not in self._logs

    def listen(self, wake: Callable[[str], None]) -> Callable[[], None]:
        """Call ``wake(experiment)`` after every batch, until the returned function is called."""
        with self._changed:
            self._listeners.append(wake)
        return lambda: self._drop(wake)

    def _drop(self, wake: Callable[[str], None]) -> None:
        with self._changed:
            if wake in self._listeners:
                self._listeners.remove(wake)
