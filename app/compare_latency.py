"""How late every single token came: the distribution of inter-token latencies, from the token events. Pure but for the reading."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from app.compare_runs import Picked
from app.components.charts import latency_chart
from app.components.numbers import seconds_quantity
from studio_state.events import Event, Tokens
from studio_state.history import History
from studio_state.stats import P99_FROM
from studio_state.store_rows import ExperimentRow

MOST_RUNS = 12
POINTS = 120
TITLE = "How late each token came"
_FLOOR_MS = 1e-3  # tokens that were decided together have no time between them; a logarithmic axis needs one
_Samples = tuple[tuple[int, tuple[float, ...]], ...]


def latencies_of(events: Iterable[Event]) -> dict[int, list[float]]:
    """Lane -> seconds between one token and the next, all items and repeats together.

    The first token of an item is not counted: its time is the time to first token.
    """
    stamps: dict[tuple[int, str, int], list[float]] = defaultdict(list)
    for e in events:
        if isinstance(e, Tokens):
            stamps[e.lane, e.item, e.repeat] += e.at
    found: dict[int, list[float]] = defaultdict(list)
    for (lane, _, _), at in stamps.items():
        found[lane] += [max(0.0, b - a) for a, b in pairwise(at)]
    return dict(found)


def read_latencies(history: History, row: ExperimentRow) -> dict[int, list[float]]:
    """The latencies of a recorded experiment; read once as long as its spool does not grow."""
    spool = history.data.spool(row.id)
    size = os.path.getsize(spool) if spool.exists() else 0
    return {lane: list(values) for lane, values in _read(history, row.id, size)}


@lru_cache(maxsize=64)
def _read(history: History, experiment: str, size: int) -> _Samples:  # the size is part of the key
    return tuple((lane, tuple(values)) for lane, values in latencies_of(history.events(experiment)).items())


def latency_figure(history: History, picked: Sequence[Picked]) -> dict[str, Any]:
    """The chart with its sentence and its table."""
    if not picked:
        return {"title": TITLE, "empty": "Pick runs above that generate tokens; their waits between two tokens are drawn here."}
    samples = {p: read_latencies(history, p.run.experiment).get(p.run.row.lane, []) for p in picked[:MOST_RUNS]}
    given = {p: v for p, v in samples.items() if len(v) > 1 and max(v) > 0}  # scored text has no waits
    if not given:
        return {
            "title": TITLE,
            "empty": "The picked runs hold no times of single tokens (they score text, failed early, or were imported from a run card); "
            "pick runs that generate text here.",
        }
    rows = [row_of(p, v) for p, v in given.items()]
    return {
        "title": TITLE,
        "specs": [latency_chart(latency_frame(given))],
        "summary": sentence(given),
        "warning": f"Only the first {MOST_RUNS} of {len(picked)} picked runs are drawn." if len(picked) > MOST_RUNS else "",
        "table": {"head": ["Run", "Waits", "Median", "p90", "p99", "Longest"], "rows": rows},
    }


def latency_frame(given: dict[Picked, list[float]]) -> pd.DataFrame:
    """Columns ``run name colour ms share``: quantiles of each run, at most ``POINTS`` of them, the longest wait included."""
    parts = []
    for p, values in given.items():
        shares = np.linspace(0, 100, min(POINTS, len(values)) + 1)[1:]
        ms = np.maximum(1000 * np.percentile(values, shares, method="inverted_cdf"), _FLOOR_MS)
        parts.append(pd.DataFrame({"run": p.id, "name": p.name, "colour": p.colour, "ms": ms, "share": shares}))
    return pd.concat(parts, ignore_index=True)


def row_of(p: Picked, values: Sequence[float]) -> dict[str, Any]:
    """The table's row of one run; p99 only from 100 waits on."""
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    cells = [p.name, f"{len(values):,}", *(str(seconds_quantity(float(v))) for v in (p50, p90))]
    return {
        "mark": p.mark,
        "colour": p.colour,
        "cells": [
            *cells,
            str(seconds_quantity(float(p99))) if len(values) >= P99_FROM else "–",
            str(seconds_quantity(max(values))),
        ],
    }


def sentence(given: dict[Picked, list[float]]) -> str:
    """Which run is the steadiest, by its 90th percentile."""
    tails = {p: float(np.percentile(v, 90)) for p, v in given.items()}
    best = min(tails, key=lambda p: tails[p])
    text = f"Nine of ten tokens of {best.name} came within {seconds_quantity(tails[best])}"
    worst = max(tails, key=lambda p: tails[p])
    return text + (f"; of {worst.name} within {seconds_quantity(tails[worst])}." if worst is not best else ".")
