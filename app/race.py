"""The state of one experiment, folded from its events. Pure: no clock, no files, no screen.

The same fold serves the live page, the ``status`` endpoint and a reload: feed it the events from
``seq`` on and it stands where the experiment stands.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from studio_state import events as ev
from studio_state.experiment import ExperimentSpec, MemoryEstimate, ModelInfo
from studio_state.metrics import METRICS


@dataclass
class Stream:
    """What one lane made of one item.

    Attributes:
        ids: token ids, one tuple per piece of text.
        pieces: the text of each tuple.
        at: seconds since the item began, one per token.
        outcome: the ``Output`` event, once the item is done.
    """

    ids: list[tuple[int, ...]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    outcome: ev.Output | None = None

    def tokens_per_s(self) -> float | None:
        """Tokens after the first over the time since the first; None before the second token."""
        return (len(self.at) - 1) / (self.at[-1] - self.at[0]) if len(self.at) > 1 and self.at[-1] > self.at[0] else None


@dataclass
class Item:
    """One item of the workload, the same for all lanes.

    Attributes:
        index, of: its place among the items.
        pieces: the prompt, token by token.
        streams: lane -> what it made of the item.
        kept: lane -> which prompt tokens it kept.
    """

    id: str
    index: int = 0
    of: int = 0
    prompt: str = ""
    pieces: list[str] = field(default_factory=list)
    streams: dict[int, Stream] = field(default_factory=dict)
    kept: dict[int, ev.Kept] = field(default_factory=dict)


@dataclass
class Value:
    """A metric of a lane, so far or final.

    Attributes:
        samples: (item, repeat) -> value, where the metric is taken per item.
        final: the value of the lane as a whole, once the worker gave it.
    """

    name: str
    source: str = "measured"
    samples: dict[tuple[str, int], float] = field(default_factory=dict)
    final: float | None = None
    is_final: bool = False
    low: float | None = None
    high: float | None = None
    n: int | None = None

    def value(self) -> float | None:
        """The final value, else the summary of the samples so far."""
        return self.final if self.is_final else summarize(self.name, list(self.samples.values()))


@dataclass
class Lane:
    """One lane of the race."""

    order: str = ""
    started: bool = False
    interleaved: bool = True
    status: str = "waiting"
    message: str = ""
    flags: list[str] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    ratios: dict[str, ev.Ratio] = field(default_factory=dict)
    items_begun: int = 0
    items_done: set[tuple[str, int]] = field(default_factory=set)


def summarize(name: str, samples: Sequence[float]) -> float | None:
    """One number from the values of the items, the way ``METRICS`` says; None where that is not defined."""
    if not samples:
        return None
    kind = METRICS[name].summary if name in METRICS else "median"
    if kind == "given":
        return None
    if kind == "last":
        return samples[-1]
    return float({"median": statistics.median, "mean": statistics.fmean, "max": max, "sum": sum}[kind](samples))


@dataclass
class Race:
    """An experiment as it stands after the events up to ``seq``.

    Attributes:
        status: ``queued``, ``running``, ``finished``, ``failed`` or ``cancelled``.
        current: id of the item that began last; ``running_lane`` the lane that works on it.
    """

    experiment: str
    seq: int = -1
    status: str = "queued"
    spec: ExperimentSpec | None = None
    owner: str = ""
    origin: str = ""
    submitted_at: float | None = None
    started_at: float | None = None
    first_item_at: float | None = None
    ended_at: float | None = None
    message: str = ""
    model: ModelInfo | None = None
    estimate: MemoryEstimate | None = None
    fits_baseline: bool = True
    phase: ev.Phase | None = None
    notes: list[ev.Note] = field(default_factory=list)
    problems: list[dict] = field(default_factory=list)
    lanes: list[Lane] = field(default_factory=list)
    items: dict[str, Item] = field(default_factory=dict)
    current: str | None = None
    running_lane: int | None = None

    @property
    def over(self) -> bool:
        """True once nothing more will happen."""
        return self.status in ev.TERMINAL

    def feed(self, events: Iterable[ev.Event]) -> bool:
        """Apply events newer than ``seq``, in order; returns True if there were any."""
        before = self.seq
        for event in events:
            if event.seq > self.seq:
                self.seq = event.seq
                _FOLD.get(type(event), _ignore)(self, event)
        return self.seq != before

    def lane(self, index: int) -> Lane:
        """The lane with this index, made on first use."""
        while len(self.lanes) <= index:
            self.lanes.append(Lane())
        return self.lanes[index]

    def item(self, item_id: str) -> Item:
        """The item with this id, made on first use."""
        return self.items.setdefault(item_id, Item(item_id, index=len(self.items)))

    def stream(self, item_id: str, lane: int) -> Stream:
        """What a lane makes of an item."""
        return self.item(item_id).streams.setdefault(lane, Stream())

    def total_items(self) -> int:
        """Items times repeats of one lane; 0 while unknown."""
        of = max((i.of for i in self.items.values()), default=0)
        return of * (self.spec.repeats if self.spec else 1)

    def progress(self) -> float | None:
        """Share of the items of all lanes that is done (0..1); None while the number of items is unknown."""
        total = self.total_items() * len(self.lanes)
        return min(1.0, sum(len(lane.items_done) for lane in self.lanes) / total) if total else None

    def eta(self, now: float) -> float | None:
        """Seconds left, from the pace of the items so far; None while there is nothing to go by."""
        done = self.progress()
        if self.over or not done or self.first_item_at is None:
            return None
        return max(0.0, (now - self.first_item_at) * (1 - done) / done)


def _ignore(race: Race, event: ev.Event) -> None:
    """Kinds that change nothing on the screen (and kinds of later versions)."""


def _submitted(race: Race, e: ev.Submitted) -> None:
    race.spec, race.owner, race.origin, race.submitted_at = e.spec, e.owner, e.origin, e.t
    for i in range(len(e.spec.lanes)):
        race.lane(i)


def _started(race: Race, e: ev.Started) -> None:
    race.status, race.started_at = "running", e.t


def _model(race: Race, e: ev.ModelLoaded) -> None:
    race.model, race.estimate, race.fits_baseline = e.info, e.estimate, e.fits_baseline


def _phase(race: Race, e: ev.Phase) -> None:
    race.phase = e


def _note(race: Race, e: ev.Note) -> None:
    race.notes.append(e)


def _lane(race: Race, e: ev.LaneStarted) -> None:
    lane = race.lane(e.lane)
    lane.order, lane.started, lane.interleaved, lane.status = e.order, True, e.interleaved, "running"


def _item(race: Race, e: ev.ItemStarted) -> None:
    item = race.item(e.item)
    item.index, item.of = e.index, e.of
    item.prompt, item.pieces = e.prompt or item.prompt, e.pieces or item.pieces
    item.streams[e.lane] = Stream(outcome=item.streams[e.lane].outcome if e.lane in item.streams else None)
    lane = race.lane(e.lane)
    lane.items_begun += 1
    race.current, race.running_lane = e.item, e.lane
    race.first_item_at = race.first_item_at or e.t


def _tokens(race: Race, e: ev.Tokens) -> None:
    stream = race.stream(e.item, e.lane)
    stream.ids.append(tuple(e.ids))
    stream.pieces.append(e.text)
    stream.at.extend(e.at)


def _metric(race: Race, e: ev.Metric) -> None:
    value = race.lane(e.lane).values.setdefault(e.name, Value(e.name))
    value.source = e.source
    if e.item is None:
        value.final, value.is_final, value.low, value.high, value.n = e.value, True, e.low, e.high, e.n
    elif e.value is not None:
        value.samples[e.item, e.repeat] = e.value


def _ratio(race: Race, e: ev.Ratio) -> None:
    race.lane(e.lane).ratios[e.name] = e


def _output(race: Race, e: ev.Output) -> None:
    race.stream(e.item, e.lane).outcome = e
    race.lane(e.lane).items_done.add((e.item, e.repeat))


def _kept(race: Race, e: ev.Kept) -> None:
    race.item(e.item).kept[e.lane] = e


def _lane_finished(race: Race, e: ev.LaneFinished) -> None:
    lane = race.lane(e.lane)
    lane.status, lane.message, lane.flags, lane.interleaved = e.status, e.message, list(e.flags), e.interleaved


def _finished(race: Race, e: ev.Finished) -> None:
    _end(race, e, "finished", "")


def _failed(race: Race, e: ev.Failed) -> None:
    race.problems = list(e.problems)
    _end(race, e, "failed", e.message)


def _cancelled(race: Race, e: ev.Cancelled) -> None:
    _end(race, e, "cancelled", e.message)


def _end(race: Race, e: ev.Event, status: str, message: str) -> None:
    race.status, race.message, race.ended_at, race.running_lane = status, message, e.t, None
    for lane in race.lanes:
        if lane.status in ("waiting", "running"):
            lane.status = "cancelled" if status == "cancelled" else "not finished"


_FOLD = {
    ev.Submitted: _submitted,
    ev.Started: _started,
    ev.ModelLoaded: _model,
    ev.Phase: _phase,
    ev.Note: _note,
    ev.LaneStarted: _lane,
    ev.ItemStarted: _item,
    ev.Tokens: _tokens,
    ev.Metric: _metric,
    ev.Ratio: _ratio,
    ev.Output: _output,
    ev.Kept: _kept,
    ev.LaneFinished: _lane_finished,
    ev.Finished: _finished,
    ev.Failed: _failed,
    ev.Cancelled: _cancelled,
}
