"""What the views work with: the catalogue, the dispatcher, the record, and what the host allows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from app.dispatch.base import Dispatch
from app.live import Races, Tokens
from app.models import ModelBook
from app.recent import Recent
from app.saved import SavedPipelines
from studio_state.catalog import Catalog
from studio_state.paths import DataDir


@dataclass
class Context:
    """Everything a view may use.

    Attributes:
        dispatch: runs experiments.
        data: the data directory.
        devices: names of the devices that can be chosen.
        local_paths: whether models and workload files may be opened by a path on this machine. Off where other
            people can reach the page.
        known: ids of experiments in the record, newest first.
    """

    catalog: Catalog
    dispatch: Dispatch
    data: DataDir
    devices: tuple[str, ...] = ("cpu",)
    local_paths: bool = True
    known: Iterable[str] = ()
    tokens: Tokens = field(default_factory=Tokens)

    def __post_init__(self) -> None:
        self.recent = Recent(self.known)
        self.races = Races(self.dispatch.since, self.dispatch.place, self.jobs)
        self.models = ModelBook(self.dispatch)
        self.saved = SavedPipelines(self.data.root / "pipelines")

    def jobs(self) -> list[dict[str, Any]]:
        """The latest experiments for the list on the page: id, what it is, how it stands."""
        return self.recent.jobs(self.races)

    def unavailable(self, device: str) -> dict[str, str]:
        """Method id -> why it cannot run on this device; empty until its worker has said hello."""
        return next((s.hello.unavailable for s in self.dispatch.status() if s.device == device and s.hello), {})
