"""Rows of the record as Python values: what the read API of :mod:`studio_state.history` hands out.

Times are unix seconds. JSON columns are parsed. None = not known (yet), or it means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ExperimentRow:
    """One experiment.

    Attributes:
        status: ``queued``, ``running``, ``finished``, ``failed``, ``cancelled``, or ``interrupted``: no terminal
            event, and no living process records it any more.
        digest: identity of what was asked for (``ExperimentSpec.digest``).
        lanes: number of lanes.
        spec, environment, model_info, estimate: the events' own JSON.
        note, tags, deleted: from the journal.
    """

    id: str
    status: str
    digest: str | None
    origin: str | None
    owner: str | None
    model: str | None
    family: str | None
    workload: str | None
    device: str | None
    dtype: str | None
    threads: int | None
    batch: int | None
    seed: int | None
    reference: int | None
    lanes: int
    submitted: float | None
    started: float | None
    ended: float | None
    error: str | None
    spec: dict[str, Any] | None
    environment: dict[str, Any] | None
    model_info: dict[str, Any] | None
    estimate: dict[str, Any] | None
    tags: tuple[str, ...]
    note: str
    deleted: bool


@dataclass(frozen=True, slots=True)
class RunRow:
    """One lane of an experiment.

    Attributes:
        pipeline: as written, in one line; ``baseline`` for the empty one.
        steps: its JSON.
        effective: the effective order in one line, once the lane has begun.
        status: ``queued``, ``running``, ``interrupted`` or a status of ``LaneFinished``.
    """

    experiment: str
    lane: int
    pipeline: str
    steps: dict[str, Any]
    effective: str | None
    status: str
    flags: tuple[str, ...]
    message: str
    interleaved: bool | None


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One value. ``item`` None = it describes the lane as a whole, with the interval ``low``..``high`` if there is one."""

    experiment: str
    seq: int
    lane: int
    name: str
    item: str | None
    repeat: int
    value: float | None
    source: str
    n: int | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class RatioRow:
    """Lane over reference, with its 95 % interval from ``n`` pairs."""

    experiment: str
    seq: int
    lane: int
    name: str
    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class OutputRow:
    """What an item ended in."""

    experiment: str
    seq: int
    lane: int
    item: str
    repeat: int
    kind: str
    text: str
    expected: str | None
    correct: bool | None
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class KeptRow:
    """An eviction map; see :class:`studio_state.events.Kept`."""

    experiment: str
    seq: int
    lane: int
    item: str
    share: list[float]
    layers: list[str]


@dataclass(frozen=True, slots=True)
class MessageRow:
    """A worker's remark (event ``note``)."""

    experiment: str
    seq: int
    t: float
    level: str
    lane: int | None
    text: str


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """How a claim came out on an experiment."""

    experiment: str
    claim: str
    verdict: str
    text: str
    numbers: dict[str, Any]
    t: float


@dataclass(frozen=True, slots=True)
class NoteRow:
    """What a person wrote on one lane; the note of the whole experiment is in :class:`ExperimentRow`."""

    experiment: str
    lane: int
    text: str
    t: float
