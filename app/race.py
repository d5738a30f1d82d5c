"""The state of one experiment, folded from its events. Pure: no clock, no files, no screen.

The same fold serves the live page, the ``status`` endpoint and a reload: feed it the events from
``seq`` on and it stands where the experiment stands. What came of the lanes is folded by
``studio_state.results``; added here is what only somebody who watches needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from app.race_parts import Item, Stream
from studio_state import events as ev
from studio_state.experiment import MemoryEstimate
from studio_state.results import Results

DISTANCES = ("psnr", "ssim", "same_output")  # of one picture to the baseline's of the same seed


@dataclass
class Race(Results):
    """An experiment as it stands after the events up to ``seq``.

    The record says of a lane how it ended or ``not finished``; a race says also that it is ``waiting`` or
    ``running``, and ``cancelled`` where the experiment was.

    Attributes:
        status: as of results, or ``interrupted`` (nobody records it any more).
        analyses: lane -> analyzer -> what it found.
        current: id of the item that began last; ``running_lane`` the lane that works on it.
    """

    LANE_STATUS: ClassVar[str] = "waiting"
    seq: int = -1
    owner: str = ""
    started_at: float | None = None
    first_item_at: float | None = None
    last_done_at: float | None = None
    ended_at: float | None = None
    estimate: MemoryEstimate | None = None
    fits_baseline: bool = True
    phase: ev.Phase | None = None
    notes: list[ev.Note] = field(default_factory=list)
    analyses: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    items: dict[str, Item] = field(default_factory=dict)
    current: str | None = None
    running_lane: int | None = None

    @property
    def over(self) -> bool:
        """True once nothing more will happen."""
        return self.status in ev.TERMINAL or self.status == "interrupted"

    def interrupt(self) -> None:
        """Nobody runs it any more, though it never ended: its process was killed, or the machine went down."""
        self.status = "interrupted"
        self.message = "The process that ran this was ended before it finished; what was measured before is kept."
        self._end(self.ended_at or self.last_done_at or self.started_at or self.submitted_at or 0.0)

    def feed(self, events: Iterable[ev.Event]) -> bool:
        """Apply events newer than ``seq``, in order; returns True if there were any."""
        before = self.seq
        for event in events:
            if event.seq > self.seq:
                self.seq = event.seq
                self.take(event)
        return self.seq != before

    def item(self, item_id: str) -> Item:
        """The item with this id, made on first use."""
        return self.items.setdefault(item_id, Item(item_id, index=len(self.items)))

    def item_with(self, chosen: str | None, has: Callable[[Item], object]) -> Item | None:
        """The item to show something of: the chosen one, else the current one, else the latest that has it."""
        item = self.items.get(chosen or self.current or "")
        if item is not None and (has(item) or chosen is not None):
            return item if has(item) else None
        return next((i for i in reversed(self.items.values()) if has(i)), None)

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
        return min(1.0, sum(len(lane.outputs) for lane in self.lanes) / total) if total else None

    def eta(self, now: float) -> float | None:
        """Seconds left, from the pace up to the last finished item; None while there is nothing to go by.

        It counts down between items; an item that takes longer than the others holds it at a tenth of the rest.
        """
        done = self.progress()
        if self.over or not done or self.first_item_at is None or self.last_done_at is None:
            return None
        rest = (self.last_done_at - self.first_item_at) * (1 - done) / done
        return max(rest - (now - self.last_done_at), rest / 10)

    def take(self, event: ev.Event) -> None:
        """Apply one event: the results first, then what only the screen shows."""
        super().take(event)
        match event:
            case ev.Tokens():
                stream = self.stream(event.item, event.lane)
                stream.ids.append(tuple(event.ids))
                stream.pieces.append(event.text)
                stream.at.extend(event.at)
            case ev.Phase():
                self.phase = event
            case ev.ItemStarted():
                self._begin(event)
            case ev.Preview():
                stream = self.stream(event.item, event.lane)
                if event.data and stream.outcome is None:  # repeats draw the same picture again
                    stream.preview = event
            case ev.Output():
                stream = self.stream(event.item, event.lane)
                stream.outcome, stream.preview, self.last_done_at = event, None, event.t
            case ev.Metric() if event.name in DISTANCES and event.item in self.items:
                self.items[event.item].measured = event.seq
            case ev.Kept():
                self.item(event.item).kept[event.lane] = event
            case ev.CacheMap():
                self.item(event.item).caches[event.lane] = event
            case ev.Picture():
                self.item(event.item).picture = event
            case ev.ImageTokens():
                self.item(event.item).image_tokens[event.lane] = event
            case ev.ExpertLoad():
                self.item(event.item).experts[event.lane] = event
            case ev.Analysis():
                self.analyses.setdefault(event.lane, {})[event.analyzer] = event.data
            case ev.Note():
                self.notes.append(event)
            case ev.Submitted():
                self.owner = event.owner
            case ev.Started():
                self.started_at = event.t
            case ev.ModelLoaded():
                self.estimate, self.fits_baseline = event.estimate, event.fits_baseline
            case ev.LaneStarted():
                self.lane(event.lane).status = "running"
            case ev.Finished() | ev.Failed() | ev.Cancelled():
                self._end(event.t)

    def _begin(self, e: ev.ItemStarted) -> None:
        item = self.item(e.item)
        item.index, item.of, item.pieces = e.index, e.of, e.pieces or item.pieces
        item.streams[e.lane] = Stream(outcome=item.streams[e.lane].outcome if e.lane in item.streams else None)
        self.current, self.running_lane = e.item, e.lane
        self.first_item_at = self.first_item_at or e.t

    def _end(self, at: float) -> None:
        self.ended_at, self.running_lane = at, None
        for lane in self.lanes:
            if lane.status in ("waiting", "running"):
                lane.status = "cancelled" if self.status == "cancelled" else "not finished"
