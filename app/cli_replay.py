"""``replay``: run what a document asks for again and say, metric by metric, what is the same."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table

from app.cli_spec import make_spec
from app.cli_table import metric_order
from app.components.numbers import metric_quantity, ratio_text
from studio_state.errors import SpecError
from studio_state.experiment import ExperimentSpec
from studio_state.metrics import METRICS

SPEED_TOLERANCE = 0.10
QUALITY_TOLERANCE = 1e-4
PROCESS_TOLERANCE = 0.05
_OF_THE_PROCESS = ("worker_rss_bytes", "peak_memory_bytes", "peak_activation_bytes")


@dataclass(frozen=True)
class Compared:
    """One metric of one lane, then and now.

    Attributes:
        allowed: in words, what still counts as the same.
        binding: a difference means that the result was not reproduced (speed differs from machine to machine).
    """

    lane: int
    metric: str
    before: float | None
    now: float | None
    verdict: Literal["same", "different"]
    allowed: str
    binding: bool


def read_card(path: Path) -> tuple[ExperimentSpec, dict[str, Any]]:
    """The spec and the whole of a ``--json`` document or run card.

    Raises:
        SpecError: no such file, or no experiment in it.
    """
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SpecError(f"cannot read {path}: {e}; give a document written by --json") from e
    spec = card.get("experiment", {}).get("spec") if isinstance(card, dict) and isinstance(card.get("experiment"), dict) else None
    if not isinstance(spec, dict) or not isinstance(card.get("lanes", []), list):
        raise SpecError(f"{path} holds no experiment: give a document written by --json (it has experiment.spec and lanes)")
    return make_spec(spec), card


def compare(before: dict[str, Any], now: dict[str, Any]) -> list[Compared]:
    """All metrics that both documents have, lane by lane."""
    found: list[Compared] = []
    for old, new in zip(before.get("lanes", []), now["lanes"], strict=False):
        for name in metric_order([old, new]):
            if name in old["metrics"] and name in new["metrics"]:
                found.append(_compared(new["lane"], name, old["metrics"][name], new["metrics"][name]))
    return found


def _compared(lane: int, name: str, before: float | None, now: float | None) -> Compared:
    group = METRICS[name].group if name in METRICS else "count"
    tolerance = {"speed": SPEED_TOLERANCE, "quality": QUALITY_TOLERANCE}.get(
        group, PROCESS_TOLERANCE if name in _OF_THE_PROCESS else 0.0
    )
    if before is None or now is None:
        same = before is now
    else:
        same = math.isclose(before, now, rel_tol=tolerance, abs_tol=QUALITY_TOLERANCE if group == "quality" else 0.0)
    allowed = f"within {tolerance:.0%}" if tolerance >= 0.01 else f"within {tolerance:g}" if tolerance else "equal"
    return Compared(
        lane, name, before, now, "same" if same else "different", allowed, group in ("quality", "count") or tolerance == 0
    )


def comparison_table(rows: list[Compared]) -> Table:
    """Then, now and the verdict."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("lane", "metric", "then", "now", "now / then", "verdict", "same means"):
        table.add_column(title, justify="left" if title in ("metric", "verdict", "same means") else "right", no_wrap=True)
    for row in rows:
        ratio = ratio_text(row.now / row.before) if row.before and row.now is not None else "–"
        values = (str(metric_quantity(row.metric, v)) for v in (row.before, row.now))
        table.add_row(str(row.lane), row.metric, *values, ratio, row.verdict, row.allowed)
    return table
