"""What the views work with: the catalogue, the dispatcher, the record, and what the host allows."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from app.dispatch.base import Dispatch
from app.hosted import HostedLimits
from app.live import Races, Tokens
from app.models import ModelBook
from app.recent import Recent
from app.saved import SavedPipelines
from studio_state.catalog import Catalog
from studio_state.claims import Claim, load_claims
from studio_state.errors import StoreError
from studio_state.estimate_errors import EstimateErrors, estimate_errors
from studio_state.paths import DataDir
from studio_state.spool import is_alive
from studio_state.store import Store


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
        host_token: lets the person who started the studio cancel any experiment; empty = nobody.
        store: the record; None where only running is wanted.
        claims: those that the papers page offers, by id.
        hosted: limits for visitors where strangers can reach the page; None = the page of one person or group.
    """

    catalog: Catalog
    dispatch: Dispatch
    data: DataDir
    devices: tuple[str, ...] = ("cpu",)
    local_paths: bool = True
    known: Iterable[str] = ()
    tokens: Tokens = field(default_factory=Tokens)
    store: Store | None = None
    host_token: str = ""
    claims: Mapping[str, Claim] = field(default_factory=load_claims)
    hosted: HostedLimits | None = None

    def __post_init__(self) -> None:
        self.recent = Recent(self.known)
        self.races = Races(self.dispatch.since, self.dispatch.place, self.jobs, self.abandoned)
        self.models = ModelBook(self.dispatch)
        self.saved = SavedPipelines(self.data.root / "pipelines")

    def jobs(self) -> list[dict[str, Any]]:
        """The latest experiments for the list on the page: id, what it is, how it stands."""
        return self.recent.jobs(self.races)

    def abandoned(self, experiment: str) -> bool:
        """True if no living process, this one included, runs or records this experiment."""
        return self.dispatch.place(experiment) is None and not is_alive(self.data.spool(experiment))

    def estimate_errors(self) -> EstimateErrors | None:
        """How far the memory estimates of the runs in the record were off; None while there are none, or none can be read."""
        if self.store is None:
            return None
        try:
            return estimate_errors(self.store.memory_needs())
        except StoreError:  # the history page says why; the estimate stands without it
            return None

    def is_host(self, token: str) -> bool:
        """True for the token of the person who started the studio."""
        return bool(self.host_token) and hmac.compare_digest(token.encode(), self.host_token.encode())

    def unavailable(self, device: str) -> dict[str, str]:
        """Method id -> why it cannot run on this device; empty until its worker has said hello."""
        return next((s.hello.unavailable for s in self.dispatch.status() if s.device == device and s.hello), {})
