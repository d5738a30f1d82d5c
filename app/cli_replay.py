"""``replay``: run what a document asks for again and say, metric by metric, what is the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from app.cli_spec import make_spec
from app.components.numbers import metric_quantity, ratio_text
from studio_state.errors import SpecError
from studio_state.experiment import ExperimentSpec
from studio_state.replay import Compared
from studio_state.runcard import is_card
from studio_state.runcard import read_card as read_run_card


def read_card(path: Path) -> tuple[ExperimentSpec, dict[str, Any]]:
    """The spec and the whole of a ``--json`` document or run card.

    Raises:
        SpecError: no such file, no experiment in it, or a run card that is newer, changed or too large.
    """
    if _is_run_card(path):
        sealed = read_run_card(path)
        return sealed.experiment.spec, sealed.document()
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SpecError(f"cannot read {path}: {e}; give a document written by --json") from e
    spec = card.get("experiment", {}).get("spec") if isinstance(card, dict) and isinstance(card.get("experiment"), dict) else None
    if not isinstance(spec, dict) or not isinstance(card.get("lanes", []), list):
        raise SpecError(f"{path} holds no experiment: give a document written by --json (it has experiment.spec and lanes)")
    return make_spec(spec), card


def _is_run_card(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return is_card(file.read(4096))
    except OSError:  # the reader of documents says what is wrong
        return False


def comparison_table(rows: Sequence[Compared], ratios: Sequence[Compared] = ()) -> Table:
    """Then, now and the verdict; the ratios to the reference lane last."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("lane", "metric", "then", "now", "now / then", "verdict", "same means"):
        table.add_column(title, justify="left" if title in ("metric", "verdict", "same means") else "right", no_wrap=True)
    for row in (*rows, *ratios):
        times = ratio_text(row.now / row.before) if row.before and row.now is not None else "–"
        show = ratio_text if row in ratios else lambda v, name=row.metric: str(metric_quantity(name, v))
        name = f"{row.metric} / reference" if row in ratios else row.metric
        table.add_row(str(row.lane), name, show(row.before), show(row.now), times, row.verdict, row.allowed)
    return table
