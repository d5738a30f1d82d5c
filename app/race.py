"""The state of one experiment, folded from its events. Pure: no clock, no files, no screen.

The same fold serves the live page, the ``status`` endpoint and a reload: feed it the events from
``seq`` on and it stands where the experiment stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from app.race_parts import Item, Lane, Stream, Value
from studio_state import events as ev
from studio_state.experiment import ExperimentSpec, MemoryEstimate, ModelInfo


@dataclass
class Race:
    """An experiment as it stands after the events up to ``seq``.

    Attributes:
        status: ``queued``, ``running``, ``finished``, ``failed``, ``cancelled``, or ``interrupted`` (nobody records it any more).
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
    last_done_at: float | None = None
    ended_at: float | None = None
    message: str = ""
    model: ModelInfo | None = None
    estimate: MemoryEstimate | None = None
    fits_baseline: bool = True
    phase: ev.Phase | None = None
    notes: list[ev.Note] = field(default_factory=list)
    problems: list[dict[str, Any]] = field(default_factory=list)
    lanes: list[Lane] = field(default_factory=list)
    items: dict[str, Item] = field(default_factory=dict)
    current: str | None = None
    running_lane: int | None = None

    @property
    def over(self) -> bool:
        """True once nothing more will happen."""
        return self.status in ev.TERMINAL or self.status == "interrupted"

    def interrupt(self) -> None:
        """Nobody runs it any more, though it never ended: its process was killed, or the machine went down."""
        _end(self, ev.Event(t=self.ended_at or self.last_done_at or self.started_at or self.submitted_at or 0.0), "interrupted",
             "The process that ran this was ended before it finished; what was measured before is kept.")  # fmt: skip

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
        """Seconds left, from the pace up to the last finished item; None while there is nothing to go by.

        It counts down between items; an item that takes longer than the others holds it at a tenth of the rest.
        """
        done = self.progress()
        if self.over or not done or self.first_item_at is None or self.last_done_at is None:
            return None
        rest = (self.last_done_at - self.first_item_at) * (1 - done) / done
        return max(rest - (now - self.last_done_at), rest / 10)


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
    race.last_done_at = e.t


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


_FOLD: dict[type[ev.Event], Callable[[Race, Any], None]] = {
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
