"""The parts of a race: items, what lanes make of them, values. Data, and how values become one number."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from studio_state import events as ev
from studio_state.metrics import METRICS

_REDUCE: dict[str, Callable[[list[float]], float]] = {
    "median": statistics.median,
    "mean": statistics.fmean,
    "max": max,
    "sum": sum,
}


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
    return float(_REDUCE[kind](list(samples)))
