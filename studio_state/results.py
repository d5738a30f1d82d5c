"""What came of one experiment, folded from its events: numbers, samples and outputs by lane. Pure.

The one fold: claims and run cards read it as it is, the live page's race builds on it (``app.race``).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, ClassVar

from studio_state import events as ev
from studio_state.experiment import ExperimentSpec, ModelInfo
from studio_state.metrics import METRICS, Source

Key = tuple[str, int]  # (item, repeat)
_REDUCE: dict[str, Callable[[list[float]], float]] = {
    "median": statistics.median,
    "mean": statistics.fmean,
    "max": max,
    "sum": sum,
    "last": itemgetter(-1),
}


def summarize(name: str, samples: Collection[float]) -> float | None:
    """One number from the values of the items, the way ``METRICS`` says; None where that is not defined."""
    reduce = _REDUCE.get(METRICS[name].summary if name in METRICS else "median")
    return float(reduce(list(samples))) if reduce and samples else None


@dataclass
class LaneResults:
    """One lane.

    Attributes:
        values: metric -> the event that describes the lane as a whole, once the worker gave it.
        samples: metric -> (item, repeat) -> value.
        sources: metric -> source of its latest value, for every metric told of, in the order of the first.
        ratios: metric -> ratio to the reference lane.
        outputs: (item, repeat) -> what the item ended in.
    """

    status: str
    order: str = ""
    message: str = ""
    flags: list[str] = field(default_factory=list)
    interleaved: bool = True
    values: dict[str, ev.Metric] = field(default_factory=dict)
    samples: dict[str, dict[Key, float]] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    ratios: dict[str, ev.Ratio] = field(default_factory=dict)
    outputs: dict[Key, ev.Output] = field(default_factory=dict)

    def value(self, name: str) -> float | None:
        """The lane's value; while the worker gave none, its samples so far summarized as ``METRICS`` says."""
        if name in self.values:
            return self.values[name].value
        return summarize(name, self.samples.get(name, {}).values())

    def take(self, event: ev.LaneStarted | ev.LaneFinished | ev.Metric | ev.Ratio | ev.Output) -> None:
        """Apply one event of this lane."""
        match event:
            case ev.Metric():
                self.sources[event.name] = event.source
                if event.item is None:
                    self.values[event.name] = event
                elif event.value is not None:
                    self.samples.setdefault(event.name, {})[event.item, event.repeat] = event.value
            case ev.Output():
                self.outputs[event.item, event.repeat] = event
            case ev.Ratio():
                self.ratios[event.name] = event
            case ev.LaneStarted():
                self.order, self.interleaved = event.order, event.interleaved
            case ev.LaneFinished():
                self.status, self.message = event.status, event.message
                self.flags, self.interleaved = list(event.flags), event.interleaved


@dataclass
class Results:
    """One experiment.

    Attributes:
        status: ``queued``, ``running`` or the terminal event: ``finished``, ``failed``, ``cancelled``.
        prompts: item -> the text the model saw.
    """

    LANE_STATUS: ClassVar[str] = "not finished"  # of a lane until its end is told
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
            self.lanes.append(LaneResults(self.LANE_STATUS))
        return self.lanes[index]

    def take(self, event: ev.Event) -> None:
        """Apply one event, in order. Kinds that change no result (and kinds of later versions) are passed over."""
        self.experiment = self.experiment or event.experiment
        match event:
            case ev.LaneStarted() | ev.LaneFinished() | ev.Metric() | ev.Ratio() | ev.Output():
                self.lane(event.lane).take(event)
            case ev.ItemStarted() if event.prompt:
                self.prompts.setdefault(event.item, event.prompt)
            case ev.Submitted():
                self.spec, self.origin, self.submitted_at = event.spec, event.origin, event.t
                self.lane(len(event.spec.lanes) - 1)
            case ev.Started():
                self.status, self.environment = "running", event.environment
            case ev.ModelLoaded():
                self.model = event.info
            case ev.Finished():
                self.status, self.seconds = "finished", event.seconds
            case ev.Failed():
                self.status, self.message, self.problems = "failed", event.message, list(event.problems)
            case ev.Cancelled():
                self.status, self.message = "cancelled", event.message


def results_of(events: Iterable[ev.Event]) -> Results:
    """Fold the events of one experiment, in order, from the first."""
    found = Results()
    for event in events:
        found.take(event)
    return found
