"""The experiments that a newcomer to the page can look at: those that run, wait, or ended last."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from app.race import Race

if TYPE_CHECKING:
    from app.live import Races

SHOWN = 8


class Recent:
    """Ids of the latest experiments, newest first.

    Args:
        known: ids from the record, newest first.
    """

    def __init__(self, known: Iterable[str] = ()):
        self._ids: deque[str] = deque(list(known)[:SHOWN], maxlen=SHOWN)
        self._lock = threading.Lock()

    def add(self, experiment: str) -> None:
        """Remember an experiment that was just submitted."""
        with self._lock:
            self._ids.appendleft(experiment)

    def jobs(self, races: Races) -> list[dict[str, Any]]:
        """One entry per experiment: id, title, status."""
        with self._lock:
            ids = list(self._ids)
        found = ((i, races.get(i)) for i in ids)
        return [{"experiment": i, "title": title(race), "status": race.status} for i, race in found if race is not None]


def title(race: Race) -> str:
    """An experiment in one line: model, workload, lanes."""
    if race.spec is None:
        return race.experiment
    own = [p.name or p.text() for p in race.spec.lanes if p.steps]
    return f"{race.spec.model} · {race.spec.workload.id} · {', '.join(own) or 'baseline only'}"
