"""Sweeps: picked runs that differ in one knob, as curves of speed or memory and of quality. Pure."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from app.compare_runs import Picked
from app.components.charts import Band, sweep_chart
from app.components.lanes import LANE_COLOURS
from app.components.numbers import metric_quantity, metric_title
from studio_state.catalog import Catalog

TITLE = "Sweeps: one knob at a time"
EMPTY = "No two picked runs differ in exactly one knob. Run the same pipeline with two or more values of a knob (the Sweep button of a knob makes the lanes), then pick them here."


class Sweep(NamedTuple):
    """Runs of the same work whose pipelines differ in one knob: (value, run), in order of the values."""

    policy: str
    knob: str
    points: list[tuple[Any, Picked]]


def full_steps(p: Picked, catalog: Catalog) -> list[tuple[str, dict[str, Any]]]:
    """Policy ids and all their knobs, those that were not set at their defaults."""
    found = []
    for step in p.run.row.steps.get("steps") or []:
        card = catalog.by_id.get(str(step.get("policy")))
        knobs = dict(step.get("knobs") or {})
        found.append((str(step.get("policy")), card.filled(knobs) if card else knobs))
    return found


def find_sweeps(picked: Sequence[Picked], catalog: Catalog) -> list[Sweep]:
    """Every knob of which the picked runs hold at least two values while all else is equal."""
    found: dict[str, list[tuple[Any, Picked]]] = defaultdict(list)
    for p in picked:
        steps = full_steps(p, catalog)
        for i, (policy, knobs) in enumerate(steps):
            for knob, value in knobs.items():
                rest = [(q, {k: v for k, v in ks.items() if (j, k) != (i, knob)}) for j, (q, ks) in enumerate(steps)]
                key = json.dumps(
                    [policy, knob, i, rest, p.group, p.run.experiment.model, p.run.experiment.dtype, p.run.experiment.threads],
                    sort_keys=True,
                )
                found[key].append((value, p))
    sweeps = []
    for key, points in found.items():
        if len({json.dumps(v) for v, _ in points}) > 1:
            policy, knob = json.loads(key)[:2]
            sweeps.append(Sweep(policy, knob, sorted(points, key=lambda point: _order(point[0]))))
    return sweeps


def _order(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (0, float(value), "") if number else (1, 0.0, str(value))


def sweep_figure(
    picked: Sequence[Picked], catalog: Catalog, x: str | None, y: str | None, band: Band | None = None
) -> dict[str, Any]:
    """The first knob's sweeps for two metrics, with a sentence and a table; ``band`` is the baseline's noise in both."""
    sweeps = find_sweeps(picked, catalog)
    metrics = [m for m in (x, y) if m]
    if not sweeps or not metrics:
        return {"title": TITLE, "empty": EMPTY}
    policy, knob = sweeps[0].policy, sweeps[0].knob
    same = [s for s in sweeps if (s.policy, s.knob) == (policy, knob)]
    frames = {m: sweep_frame(same, m, baselines(picked, m)) for m in metrics}
    title = catalog.by_id[policy].title if policy in catalog.by_id else policy
    noise = {str(x): (band.x_low, band.x_high), str(y): (band.y_low, band.y_high)} if band else {}
    others = sorted({f"{s.policy}: {s.knob}" for s in sweeps if (s.policy, s.knob) != (policy, knob)})
    return {
        "title": TITLE,
        "specs": [sweep_chart(f, f"{title}: {knob}", m, noise.get(m)) for m, f in frames.items() if not f.empty],
        "summary": " ".join(filter(None, (_trend(frames[m], f"{title}'s {knob}", m) for m in metrics)))
        or f"{title}'s {knob} was varied.",
        "warning": f"The picked runs also vary {', '.join(others)}; pick fewer runs to see those curves." if others else "",
        "table": _table(same, knob, metrics),
    }


def baselines(picked: Sequence[Picked], metric: str) -> dict[str, float]:
    """Group and model -> the value of its first picked baseline."""
    found: dict[str, float] = {}
    for p in picked:
        value = p.run.value(metric)
        if p.is_baseline and value is not None:
            found.setdefault(f"{p.group} {p.run.experiment.model}", value)
    return found


def sweep_frame(sweeps: Sequence[Sweep], metric: str, base: Mapping[str, float]) -> pd.DataFrame:
    """Columns ``sweep knob value colour mark name base``; runs without the metric are left out."""
    rows = []
    for i, sweep in enumerate(sweeps):
        for value, p in sweep.points:
            y = p.run.value(metric)
            if y is not None:
                shown = value if _order(value)[0] == 0 else json.dumps(value)
                rows.append({
                    "sweep": i, "knob": shown, "value": y, "colour": LANE_COLOURS[1 + i % (len(LANE_COLOURS) - 1)], "mark": p.mark, "name": p.name,
                    "base": base.get(f"{p.group} {p.run.experiment.model}"),
                })  # fmt: skip
    frame = pd.DataFrame(rows, columns=["sweep", "knob", "value", "colour", "mark", "name", "base"])
    return frame.assign(base=frame["base"].astype(float))


def _trend(frame: pd.DataFrame, what: str, metric: str) -> str:
    """From the lowest to the highest value of the first sweep."""
    first = frame[frame["sweep"] == 0]
    if len(first) < 2:
        return ""
    a, b = first.iloc[0], first.iloc[-1]
    return f"From {what} {a['knob']} to {b['knob']}, {metric_title(metric).lower()} goes from {metric_quantity(metric, a['value'])} to {metric_quantity(metric, b['value'])}."


def _table(sweeps: Sequence[Sweep], knob: str, metrics: Sequence[str]) -> dict[str, Any]:
    rows = [
        {
            "mark": p.mark,
            "colour": p.colour,
            "cells": [
                p.name,
                json.dumps(v) if isinstance(v, str) else str(v),
                *(str(metric_quantity(m, p.run.value(m))) for m in metrics),
            ],
        }
        for s in sweeps
        for v, p in s.points
    ]
    return {"head": ["Run", knob, *map(metric_title, metrics)], "rows": rows}
