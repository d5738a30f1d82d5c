"""One page of the history, ready to be shown: experiments, their lanes, and the numbers of whole lanes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from studio_state.history import History
from studio_state.store_rows import ExperimentRow, MetricRow, RatioRow, RunRow

PAGE_ROWS = 20
RunKey = tuple[str, int]  # (experiment, lane)


@dataclass(frozen=True)
class Run:
    """One lane of an experiment with the numbers of the whole lane.

    Attributes:
        metrics: name -> the latest value that describes the lane.
        ratios: name -> ratio to the reference lane.
    """

    experiment: ExperimentRow
    row: RunRow
    metrics: dict[str, MetricRow] = field(default_factory=dict)
    ratios: dict[str, RatioRow] = field(default_factory=dict)

    @property
    def key(self) -> RunKey:
        """What identifies a run in the record."""
        return (self.experiment.id, self.row.lane)

    def value(self, name: str) -> float | None:
        """The lane's value of a metric."""
        return self.metrics[name].value if name in self.metrics else None


@dataclass(frozen=True)
class HistoryPage:
    """Experiments of one page, their runs by experiment, and how many experiments there are in all."""

    experiments: list[ExperimentRow]
    runs: dict[str, list[Run]]
    total: int


def read_page(
    history: History, page: int = 0, size: int = PAGE_ROWS, *, deleted: bool = False, **filters: str | None
) -> HistoryPage:
    """One page, newest experiments first.

    Args:
        page: from 0.
        deleted: only deleted experiments instead of the others.
        filters: as in :meth:`History.experiments`.
    """
    rows = history.experiments(size, page * size, deleted=deleted, **filters)
    return HistoryPage(rows, _runs_of(history, rows), history.count(deleted=deleted, **filters))


def read_runs(history: History, keys: Sequence[RunKey]) -> list[Run]:
    """The runs with these keys, in this order; keys that are not in the record are left out."""
    ids = list(dict.fromkeys(x for x, _ in keys))
    rows = history.experiments_of(ids)
    found = {run.key: run for runs in _runs_of(history, rows).values() for run in runs}
    return [found[k] for k in dict.fromkeys(keys) if k in found]


def _runs_of(history: History, rows: Sequence[ExperimentRow]) -> dict[str, list[Run]]:
    """Runs of some experiments by experiment, in three queries."""
    by_id = {row.id: row for row in rows}
    if not by_id:
        return {}
    metrics: dict[RunKey, dict[str, MetricRow]] = defaultdict(dict)
    ratios: dict[RunKey, dict[str, RatioRow]] = defaultdict(dict)
    for m in history.metrics(list(by_id), items=False):
        metrics[m.experiment, m.lane][m.name] = m
    for r in history.ratios(list(by_id)):
        ratios[r.experiment, r.lane][r.name] = r
    found: dict[str, list[Run]] = {x: [] for x in by_id}
    for row in history.runs(list(by_id)):
        key = (row.experiment, row.lane)
        found[row.experiment].append(Run(by_id[row.experiment], row, metrics[key], ratios[key]))
    return found
