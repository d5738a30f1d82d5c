"""Picked runs as a table for other programs: one row per value, with everything that tells what it was measured on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import duckdb
import pandas as pd

from studio_state.errors import StoreError
from studio_state.history import History
from studio_state.history_page import Run, RunKey, read_runs
from studio_state.metrics import METRICS

COLUMNS: dict[str, str] = {
    "experiment": "VARCHAR", "lane": "BIGINT", "submitted": "TIMESTAMP", "status": "VARCHAR", "model": "VARCHAR", "family": "VARCHAR",
    "workload": "VARCHAR", "options": "VARCHAR", "device": "VARCHAR", "dtype": "VARCHAR", "threads": "BIGINT", "batch": "BIGINT", "seed": "BIGINT",
    "name": "VARCHAR", "pipeline": "VARCHAR", "effective": "VARCHAR", "flags": "VARCHAR", "tags": "VARCHAR", "note": "VARCHAR",
    "metric": "VARCHAR", "unit": "VARCHAR", "item": "VARCHAR", "repeat": "BIGINT", "value": "DOUBLE", "low": "DOUBLE", "high": "DOUBLE", "n": "BIGINT",
    "source": "VARCHAR", "ratio": "DOUBLE", "ratio_low": "DOUBLE", "ratio_high": "DOUBLE", "ratio_n": "BIGINT",
}  # fmt: skip
Kind = Literal["csv", "parquet"]


def export_runs(history: History, keys: Sequence[RunKey], kind: Kind) -> bytes:
    """A file with all values of some runs, those of single items included; ``item`` empty = of the whole lane.

    The ratio to the reference lane stands in the rows of whole lanes. Times are UTC.

    Raises:
        StoreError: none of the runs is in the record, or the file cannot be written.
    """
    runs = {r.key: r for r in read_runs(history, keys)}
    if not runs:
        raise StoreError("there is nothing to export: pick at least one run")
    rows = [
        [*_run_cells(runs[m.experiment, m.lane]), m.name, METRICS[m.name].unit if m.name in METRICS else "", m.item, m.repeat, m.value, m.low, m.high, m.n, m.source,
         *(_ratio_cells(runs[m.experiment, m.lane], m.name) if m.item is None else [None] * 4)]
        for m in history.metrics(list(dict.fromkeys(x for x, _ in runs)))
        if (m.experiment, m.lane) in runs
    ]  # fmt: skip
    return _file(pd.DataFrame(rows, columns=list(COLUMNS)), kind)


def _run_cells(run: Run) -> list[Any]:
    e, row = run.experiment, run.row
    options = json.dumps(((e.spec or {}).get("workload") or {}).get("options") or {}, sort_keys=True)
    moment = pd.Timestamp(e.submitted, unit="s") if e.submitted else pd.NaT
    return [
        e.id, row.lane, moment, row.status, e.model, e.family, e.workload, options, e.device, e.dtype, e.threads, e.batch, e.seed,
        str(row.steps.get("name") or ""), row.pipeline, row.effective, "; ".join(row.flags), ", ".join(e.tags), e.note,
    ]  # fmt: skip


def _ratio_cells(run: Run, name: str) -> list[Any]:
    r = run.ratios.get(name)
    return [r.value, r.low, r.high, r.n] if r else [None] * 4


def _file(frame: pd.DataFrame, kind: Kind) -> bytes:
    casts = ", ".join(f'CAST("{name}" AS {kind_}) AS "{name}"' for name, kind_ in COLUMNS.items())
    with tempfile.TemporaryDirectory() as folder, duckdb.connect() as con:
        target = Path(folder) / f"runs.{kind}"
        con.register("given", frame.astype(object).where(frame.notna(), None))
        options = "FORMAT csv, HEADER" if kind == "csv" else "FORMAT parquet"
        try:
            con.execute(f"COPY (SELECT {casts} FROM given) TO '{str(target).replace(chr(39), chr(39) * 2)}' ({options})")
            return target.read_bytes()
        except (duckdb.Error, OSError) as e:
            raise StoreError(f"the export cannot be written: {str(e).splitlines()[0]}; free the disk and try again") from e
