"""Speed or memory against quality: which runs no other run beats, and how wide the baseline's noise is. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from app.compare_runs import Picked
from app.components.charts import Band, pareto_chart
from app.components.numbers import interval_text, metric_quantity, metric_title, ratio_text
from studio_state.history import History
from studio_state.metrics import METRICS
from studio_state.stats import paired_bootstrap
from studio_state.store_rows import MetricRow

Figure = dict[str, Any]
EMPTY = "Pick at least two runs above: a baseline and what you want to hold against it. Each becomes a point here."


def pareto_figure(picked: Sequence[Picked], x: str | None, y: str | None, band: Band | None) -> Figure:
    """The chart with its sentence and its table; without runs, what to do next."""
    title = "Pareto: what is bought with quality"
    if not picked or x is None or y is None:
        missing = (
            EMPTY
            if not picked
            else "The picked runs have no metric of quality to set against speed or memory; pick runs of a workload that scores."
        )
        return {"title": title, "empty": missing}
    frame = pareto_frame(picked, x, y)
    if frame.empty:
        return {
            "title": title,
            "empty": f"None of the picked runs has both {metric_title(x).lower()} and {metric_title(y).lower()}; choose other axes.",
        }
    return {
        "title": title,
        "specs": [pareto_chart(frame, x, y, band)],
        "summary": summary(frame, x, y, band),
        "announce": True,
        "warning": warning(picked),
        "table": _table(picked, frame, x, y, band),
    }


def pareto_frame(picked: Sequence[Picked], x: str, y: str) -> pd.DataFrame:
    """One row a run: ``run name x y baseline dominated dim by mark colour group``; runs without both numbers are left out.

    A baseline is not beaten by another baseline (that is noise), and is never dimmed.
    """
    rows = []
    for p in picked:
        a, b = p.run.value(x), p.run.value(y)
        if a is not None and b is not None:
            rows.append(
                {
                    "run": p.id,
                    "name": p.name,
                    "x": a,
                    "y": b,
                    "baseline": p.is_baseline,
                    "mark": p.mark,
                    "colour": p.colour,
                    "group": p.group,
                }
            )
    frame = pd.DataFrame(rows, columns=["run", "name", "x", "y", "baseline", "mark", "colour", "group"])
    by = [_beaten_by(row, frame, x, y) for row in frame.to_dict("records")]
    beaten = pd.Series([b != "" for b in by], index=frame.index, dtype=bool)
    return frame.assign(dominated=beaten, dim=beaten & ~frame["baseline"].astype(bool), by=by)


def _beaten_by(row: dict[str, Any], frame: pd.DataFrame, x: str, y: str) -> str:
    """Name of a run of the same group that is at least as good in both and better in one; empty if there is none."""
    a, b = _sign(x) * row["x"], _sign(y) * row["y"]
    for other in frame[frame["group"] == row["group"]].to_dict("records"):
        if row["baseline"] and other["baseline"]:
            continue
        c, d = _sign(x) * other["x"], _sign(y) * other["y"]
        if c >= a and d >= b and (c > a or d > b):
            return str(other["name"])
    return ""


def _sign(metric: str) -> int:
    return 1 if METRICS[metric].better == "higher" else -1


# -- the noise of the baseline ---------------------------------------------------------------------------------------


def baseline_band(history: History, picked: Sequence[Picked], x: str | None, y: str | None) -> Band | None:
    """Where the first picked baseline may lie by chance alone, in both directions.

    The 95 % interval from its own items (the recorded one, else a bootstrap of their mean, moved to the value shown),
    widened to every other picked baseline that did the same work: run to run is noise too.
    """
    baselines = [p for p in picked if p.is_baseline]
    if not baselines or x is None or y is None:
        return None
    first = baselines[0]
    same = [p for p in baselines if p.group == first.group and p.run.experiment.model == first.run.experiment.model]
    edges = [_range(history, same, name) for name in (x, y)]
    if edges[0] is None or edges[1] is None:
        return None
    return Band(*edges[0], *edges[1], n=_items(first, x, y))


def _range(history: History, same: Sequence[Picked], name: str) -> tuple[float, float] | None:
    found: list[float] = []
    for p in same:
        row = p.run.metrics.get(name)
        if row is not None and row.value is not None:
            found += _interval(history, p, row)
    return (min(found), max(found)) if found else None


def _interval(history: History, p: Picked, row: MetricRow) -> tuple[float, float]:
    value = float(row.value or 0.0)
    if row.low is not None and row.high is not None:
        return row.low, row.high
    if row.name == "perplexity":  # exp of a mean over items
        half = _half_width(history, p, "nll")
        return value * math.exp(-half), value * math.exp(half)
    half = _half_width(history, p, row.name)
    return value - half, value + half


def _half_width(history: History, p: Picked, name: str) -> float:
    """Half the 95 % interval of the mean over the run's items; 0 where fewer than two were kept."""
    experiment, lane = p.run.key
    samples = [
        m.value for m in history.metrics(experiment, name=name) if m.lane == lane and m.item is not None and m.value is not None
    ]
    if len(samples) < 2:
        return 0.0
    mean = paired_bootstrap(samples, [0.0] * len(samples))
    return 0.0 if mean.high is None else mean.high - mean.value


def _items(p: Picked, *names: str) -> int:
    return max((p.run.metrics[n].n or 0 for n in names if n in p.run.metrics), default=0)


# -- words -----------------------------------------------------------------------------------------------------------


def summary(frame: pd.DataFrame, x: str, y: str, band: Band | None) -> str:
    """Which policies are on the front, how many are beaten, and which lie within the noise."""
    own = frame[~frame["baseline"].astype(bool)]
    if own.empty:
        return "Only baselines are picked; pick lanes with policies to hold against them."
    axes = f"{metric_title(x).lower()} and {metric_title(y).lower()}"
    front, beaten = [str(n) for n in own[~own["dominated"]]["name"]], int(own["dominated"].sum())
    if not front:
        text = f"{'The picked policy run is' if len(own) == 1 else f'All {len(own)} picked policy runs are'} beaten in {axes}."
    else:
        text = f"{_listed(front)} {'is' if len(front) == 1 else 'are'} on the front: no other run is at least as good in {axes}"
        text += f"; {beaten} of {len(own)} {'is' if beaten == 1 else 'are'} beaten." if beaten else "."
    inside = [str(r["name"]) for r in own.to_dict("records") if band is not None and band.holds(r["x"], r["y"])]
    return text + (
        f" {_listed(inside)} {'lies' if len(inside) == 1 else 'lie'} within the baseline's noise: no difference is shown."
        if inside
        else ""
    )


def _verdict(row: dict[str, Any], band: Band | None) -> str:
    if row["baseline"]:
        return "baseline"
    text = f"beaten by {row['by']}" if row["dominated"] else "on the front"
    return f"{text}; within the noise" if band is not None and band.holds(row["x"], row["y"]) else text


def warning(picked: Sequence[Picked]) -> str:
    """Said when runs are side by side that did different work."""
    groups = {p.group for p in picked}
    if len(groups) < 2:
        return ""
    workloads = {p.run.experiment.workload for p in picked}
    what = (
        f"different workloads ({', '.join(sorted(str(w) for w in workloads))})"
        if len(workloads) > 1
        else "different options, devices or seeds"
    )
    return f"These runs are of {what}: a run is only called beaten by one that did the same work."


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = list(names[:most]) + ([f"{len(names) - most} more"] if len(names) > most else [])
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]


def _table(picked: Sequence[Picked], frame: pd.DataFrame, x: str, y: str, band: Band | None) -> dict[str, Any]:
    by_id = {p.id: p for p in picked}
    rows = []
    for r in frame.to_dict("records"):
        p = by_id[r["run"]]
        rows.append({
            "id": p.id, "mark": p.mark, "colour": p.colour,
            "cells": [p.name, *_cells(p, x), *_cells(p, y), _verdict(r, band)],
        })  # fmt: skip
    return {"head": ["Run", metric_title(x), "to its reference", metric_title(y), "to its reference", "Verdict"], "rows": rows}


def _cells(p: Picked, name: str) -> list[str]:
    row, ratio = p.run.metrics[name], p.run.ratios.get(name)
    against = ratio_text(ratio.value) if ratio else ""
    spread = interval_text(ratio.low, ratio.high) if ratio else ""
    return [str(metric_quantity(name, row.value)), f"{against} ({spread})" if spread else against]
