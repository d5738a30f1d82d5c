"""Base class of analyzers, and how they are found: one file an analyzer, no list to edit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar, NamedTuple

from studio_state.catalog import Card
from studio_state.metrics import Source
from workers.cards import Declared
from workers.mechanisms.phases import ShortRun
from workers.methods import classes_in, unique


class Measured(NamedTuple):
    """A metric that an analyzer takes.

    Attributes:
        name: in ``studio_state.metrics``.
        values: one a pass, so that there is an interval; a single one describes the lane as a whole.
    """

    name: str
    values: tuple[float, ...]
    source: Source = "measured"


class Analyzer(Declared):
    """An analyzer measures a lane without changing what it computes. It runs after the race, in passes of its own."""

    card: ClassVar[Card]

    @abstractmethod
    def analyze(self, run: ShortRun) -> dict[str, Any]:
        """What it found of one lane, as plain data."""

    def metrics(self, data: dict[str, Any]) -> Iterator[Measured]:
        """Which metrics of the lane follow from what it found; none by default."""
        yield from ()

    @classmethod
    def describe(cls) -> Card:
        """The card completed with summary, docstring and knob schema from the class."""
        doc = (cls.__doc__ or "").strip()
        return cls.card.model_copy(
            update={"summary": cls.card.summary or cls.summary_line(), "doc": doc, "knobs": cls.knob_schema()}
        )


@cache
def analyzers() -> dict[str, type[Analyzer]]:
    """Analyzer id -> class.

    Raises:
        RuntimeError: two files declare the same id.
    """
    return unique(classes_in("workers.analyzers", Analyzer))
