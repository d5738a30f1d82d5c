"""What came of one experiment, folded from its events: numbers, samples and outputs by lane. Pure.

The claims and the run cards read this. (The live page has its own fold, which follows streams of text.)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from studio_state import events as ev
from studio_state.experiment import ExperimentSpec, ModelInfo
from studio_state.metrics import METRICS

Key = tuple[str, int]  # (item, repeat)
_REDUCE: dict[str, Callable[[list[float]], float]] = {
    "median": statistics.median,
    "mean": statistics.fmean,
    "max": max,
    "sum": sum,
}


@dataclass
class LaneResults:
    """One lane.

    Attributes:
        values: metric -> the event that describes the lane as a whole.
        samples: metric -> (item, repeat) -> value.
        ratios: metric -> ratio to the reference lane.
        outputs: (item, repeat) -> what the item ended in.
    """

    order: str = ""
    status: str = "not finished"
    message: str = ""
    flags: list[str] = field(default_factory=list)
    interleaved: bool = True
    values: dict[str, ev.Metric] = field(default_factory=dict)
    samples: dict[str, dict[Key, float]] = field(default_factory=dict)
    ratios: dict[str, ev.Ratio] = field(default_factory=dict)
    outputs: dict[Key, ev.Output] = field(default_factory=dict)

    def value(self, name: str) -> float | None:
        """The lane's value; where the worker gave none, its samples summarized as ``METRICS`` says."""
        if name in self.values:
            return self.values[name].value
        reduce = _REDUCE.get(METRICS[name].summary) if name in METRICS else None
        samples = list(self.samples.get(name, {}).values())
        return float(reduce(samples)) if reduce and samples else None


@dataclass
class Results:
    """One experiment.

    Attributes:
        status: ``queued``, ``running`` or the terminal event: ``finished``, ``failed``, ``cancelled``.
        prompts: item -> the text the model saw.
    """

    experiment: str = ""
    status: str = "queued"
    message: str = ""
    problems: list[dict[str, Any]] = field(default_factory=list)
    origin: str = ""
    submitted_at: float | None = None
    seconds: float | None = None
    spec: ExperimentSpec | None = None
    model: ModelInfo | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    lanes: list[LaneResults] = field(default_factory=list)

    def lane(self, index: int) -> LaneResults:
        """The lane with this index, made on first use."""
        while len(self.lanes) <= index:
            self.lanes.append(LaneResults())
        return self.lanes[index]


def results_of(events: Iterable[ev.Event]) -> Results:
    """Fold the events of one experiment, in order, from the first."""
    found = Results()
    for event in events:
        found.experiment = found.experiment or event.experiment
        _take(found, event)
    return found


def _take(found: Results, event: ev.Event) -> None:
    match event:
        case ev.Submitted():
            found.spec, found.origin, found.submitted_at = event.spec, event.origin, event.t
            found.lane(len(event.spec.lanes) - 1)
        case ev.Started():
            found.status, found.environment = "running", event.environment
        case ev.ModelLoaded():
            found.model = event.info
        case ev.ItemStarted() if event.prompt:
            found.prompts.setdefault(event.item, event.prompt)
        case ev.Finished():
            found.status, found.seconds = "finished", event.seconds
        case ev.Failed():
            found.status, found.message, found.problems = "failed", event.message, list(event.problems)
        case ev.Cancelled():
            found.status, found.message = "cancelled", event.message
        case ev.LaneStarted() | ev.LaneFinished() | ev.Metric() | ev.Ratio() | ev.Output():
            _take_lane(found.lane(event.lane), event)


def _take_lane(lane: LaneResults, event: ev.LaneStarted | ev.LaneFinished | ev.Metric | ev.Ratio | ev.Output) -> None:
    match event:
        case ev.LaneStarted():
            lane.order, lane.interleaved = event.order, event.interleaved
        case ev.LaneFinished():
            lane.status, lane.message = event.status, event.message
            lane.flags, lane.interleaved = list(event.flags), event.interleaved
        case ev.Metric(item=None):
            lane.values[event.name] = event
        case ev.Metric():
            if event.value is not None and event.item is not None:
                lane.samples.setdefault(event.name, {})[event.item, event.repeat] = event.value
        case ev.Ratio():
            lane.ratios[event.name] = event
        case ev.Output():
            lane.outputs[event.item, event.repeat] = event
