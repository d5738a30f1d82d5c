"""Two runs side by side: what was asked, where it ran, what came out, with ratios and paired tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.compare_runs import Picked
from app.compare_sweep import full_steps
from app.components.numbers import digits, interval_text, metric_quantity, metric_title, ratio_text
from app.race_view import verdict
from studio_state.catalog import Catalog
from studio_state.estimates import Estimate, difference_between, ratio_between
from studio_state.events import Ratio
from studio_state.history import History
from studio_state.metrics import METRICS
from studio_state.results import LaneResults, Results, results_of
from studio_state.stats import mcnemar

GROUPS = ("speed", "memory", "quality", "count")
_DIFFERENCES = ("nll", "kl_to_baseline", "top1_agreement", "first_divergence", "same_output", "ssim", "class_agreement")
MISSING = "–"


@dataclass(frozen=True)
class Side:
    """One of the two runs: how it is shown, and its lane with all samples."""

    picked: Picked
    results: Results
    lane: LaneResults


def read_side(history: History, picked: Picked) -> Side:
    """A run with the samples that its spool holds."""
    experiment, lane = picked.run.key
    results = results_of(history.events(experiment))
    return Side(picked, results, results.lane(lane))


def diff_of(a: Side, b: Side, catalog: Catalog) -> dict[str, Any]:
    """Everything the page shows: names, sections of rows, and sentences on what may be concluded.

    The ratios are b over a; a row is ``{name, a, b, ratio, test, differs}``.
    """
    spec = _rows(specification(a.picked, catalog), specification(b.picked, catalog))
    place = _rows(_flat(a.results.environment), _flat(b.results.environment))
    return {
        "a": _head(a.picked),
        "b": _head(b.picked),
        "notes": cautions(a, b),
        "sections": [
            {"title": "Specification", "rows": spec, "same": _same(spec, "All settings are equal.")},
            {"title": "Environment", "rows": place, "same": _same(place, "Both ran in the same environment.")},
            {"title": "Results", "rows": result_rows(a, b), "same": "", "numbers": True},
        ],
    }


def _head(p: Picked) -> dict[str, str]:
    return {"id": p.id, "name": p.name, "mark": p.mark, "colour": p.colour}


# -- what was asked, and where ---------------------------------------------------------------------------------------


def specification(p: Picked, catalog: Catalog) -> dict[str, str]:
    """What was asked for in one run: the experiment's fields, the workload's options, every knob of every policy."""
    spec = {k: v for k, v in (p.run.experiment.spec or {}).items() if k not in ("version", "lanes", "workload", "reference")}
    workload = (p.run.experiment.spec or {}).get("workload") or {}
    card = catalog.workload_by_id.get(str(workload.get("id")))
    options = {**(card.defaults() if card else {}), **(workload.get("options") or {})}
    found = {"workload": str(workload.get("id") or p.run.experiment.workload or "")} | _flat({"options": options}) | _flat(spec)
    found["pipeline"] = p.run.row.pipeline
    found["effective order"] = p.run.row.effective or ""
    for policy, knobs in full_steps(p, catalog):
        found |= {f"{policy}.{k}": _text(v) for k, v in knobs.items()}
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as ``a.b.c`` -> text."""
    if isinstance(value, Mapping):
        found: dict[str, str] = {}
        for key, inner in value.items():
            found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: _text(value)}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _rows(a: Mapping[str, str], b: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row a name of either side; those that differ first."""
    rows = [
        {"name": n, "a": a.get(n, MISSING), "b": b.get(n, MISSING), "differs": a.get(n) != b.get(n)}
        for n in dict.fromkeys([*a, *b])
    ]
    return sorted(rows, key=lambda r: not r["differs"])


def _same(rows: Sequence[Mapping[str, Any]], text: str) -> str:
    return "" if any(r["differs"] for r in rows) else text


# -- what came out ---------------------------------------------------------------------------------------------------


def pairs_allowed(a: Side, b: Side) -> bool:
    """True if both saw the same items: the same prompts where they are known, else the same workload, options and seed."""
    if a.results.prompts and b.results.prompts:
        shared = a.results.prompts.keys() & b.results.prompts.keys()
        return bool(shared) and all(a.results.prompts[i] == b.results.prompts[i] for i in shared)
    return a.picked.group == b.picked.group


def cautions(a: Side, b: Side) -> list[str]:
    """Sentences about what the numbers below can and cannot say."""
    found = []
    if a.picked.run.key == b.picked.run.key:
        found.append("Both sides are the same run; choose another one.")
    elif not pairs_allowed(a, b):
        found.append(
            "The two runs did not see the same items, so nothing is paired: the ratios are of two single numbers, without intervals or tests."
        )
    elif a.results.experiment != b.results.experiment:
        found.append(
            "The two runs were not interleaved: they are of different experiments, so slow drift of the machine is part of the ratios of speed."
        )
    found += [f"{s.picked.name}: {flag}" for s in (a, b) for flag in (*s.lane.flags, s.lane.message) if flag]
    return found


def result_rows(a: Side, b: Side) -> list[dict[str, Any]]:
    """One row a metric that either side has, by group."""
    names = [n for g in GROUPS for n in METRICS if METRICS[n].group == g and n != "p_value"]
    paired = pairs_allowed(a, b)
    rows = []
    for name in names:
        x, y = a.lane.value(name), b.lane.value(name)
        if x is None and y is None:
            continue
        ratio = _ratio(name, a, b, paired)
        rows.append({
            "name": metric_title(name), "group": METRICS[name].group, "metric": name,
            "a": str(metric_quantity(name, x)), "b": str(metric_quantity(name, y)), "differs": x != y,
            "ratio": ratio_text(ratio.value), "interval": interval_text(ratio.low, ratio.high) if ratio.low != ratio.high else "",
            "verdict": verdict_of(name, ratio), "test": paired_test(name, a, b) if paired else "",
        })  # fmt: skip
    return rows


def _ratio(name: str, a: Side, b: Side, paired: bool) -> Estimate:
    """b over a with an interval where pairs give one; the ratio of the two numbers else."""
    if not METRICS[name].ratio:
        return Estimate(None)
    if paired and name != "accuracy":
        found = ratio_between(name, b.lane, a.lane)
        if found.value is not None:
            return found
    x, y = a.lane.value(name), b.lane.value(name)
    return Estimate(y / x if x and y is not None else None)


def verdict_of(name: str, ratio: Estimate) -> str:
    """Whether b is better than a, by the same rule as on the live page; empty where there is no ratio."""
    return (
        "" if ratio.value is None else verdict(name, Ratio(lane=0, name=name, value=ratio.value, low=ratio.low, high=ratio.high))
    )


def paired_test(name: str, a: Side, b: Side) -> str:
    """The paired test of a quality metric in words; empty where none applies."""
    if name == "accuracy":
        return _mcnemar_text(a, b)
    if name not in _DIFFERENCES:
        return ""
    d = difference_between(name, b.lane, a.lane)
    if d.value is None or d.low is None or d.high is None:
        return ""
    clear = d.low > 0 or d.high < 0
    return f"B − A: {digits(d.value)} ({digits(d.low)} to {digits(d.high)}, paired bootstrap, n = {d.n}); {'a difference' if clear else 'no clear difference'}"


def _mcnemar_text(a: Side, b: Side) -> str:
    keys = [
        k
        for k, o in a.lane.outputs.items()
        if o.correct is not None and k in b.lane.outputs and b.lane.outputs[k].correct is not None
    ]
    if not keys:
        return ""
    test = mcnemar([bool(a.lane.outputs[k].correct) for k in keys], [bool(b.lane.outputs[k].correct) for k in keys])
    d = difference_between("accuracy", b.lane, a.lane)
    spread = (
        f", B − A {digits(100 * d.value)} points ({digits(100 * d.low)} to {digits(100 * d.high)})"
        if d.value is not None and d.low is not None and d.high is not None
        else ""
    )
    return f"only A right: {test.only_a}, only B right: {test.only_b} of {test.n}; McNemar p = {digits(test.p_value)}{spread}"
