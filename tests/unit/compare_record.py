"""Small made-up experiments in real spools, read through a real in-memory DuckDB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from app.compare_runs import Picked, load_picked
from studio_state import events as ev
from studio_state.experiment import ExperimentSpec, WorkloadSpec
from studio_state.history import History
from studio_state.paths import DataDir
from studio_state.pipeline import parse_pipeline
from studio_state.spool import SpoolWriter

Values = Mapping[str, float]


class Record:
    """A data directory that experiments are written into."""

    def __init__(self, root: Path):
        self.data = DataDir.at(root / "data", root / "cache").open()
        self.ids: list[str] = []

    def add(
        self,
        lanes: Mapping[str, Values],
        *,
        model: str = "m",
        workload: str = "needle",
        seed: int = 0,
        more: Sequence[ev.Event] = (),
        options: Mapping[str, int] | None = None,
    ) -> str:
        """An experiment: pipeline in one line -> metrics of the whole lane. The first should be ``baseline``."""
        experiment = f"e{len(self.ids):04d}"
        spec = ExperimentSpec(
            model=model,
            workload=WorkloadSpec(id=workload, options=dict(options or {})),
            lanes=tuple(map(parse_pipeline, lanes)),
            seed=seed,
        )
        with SpoolWriter(self.data.spool(experiment)) as spool:
            spool.append(ev.Submitted(spec=spec, t=1.7e9 + len(self.ids)))
            spool.append_all(
                [ev.Metric(lane=i, name=n, value=v) for i, values in enumerate(lanes.values()) for n, v in values.items()]
            )
            spool.append_all([*more, ev.Finished()])
        self.ids.append(experiment)
        return experiment

    def history(self) -> History:
        """What was written so far."""
        return History.in_memory(self.data)

    def picked(self, history: History | None = None) -> list[Picked]:
        """Every lane of every experiment."""
        history = history or self.history()
        return load_picked(history, [f"{r.experiment}/{r.lane}" for r in history.runs(self.ids)])
