"""``history``: the record, read into memory; the studio's own database is never opened."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

from rich.console import Console

from app.cli_lists import print_json, print_table
from app.cli_table import print_result, remarks
from app.report import document
from app.script_export import export_script
from studio_state.catalog import Catalog
from studio_state.errors import SpecError, StoreError
from studio_state.paths import DataDir
from studio_state.runcard_record import export_card
from studio_state.spool import read_spool


def show_history(data: DataDir, limit: int, as_json: bool) -> None:
    """The newest experiments."""
    from studio_state.history import History

    past = History.in_memory(data)
    try:
        rows = past.experiments(limit=limit)
        lanes: dict[str, list[str]] = {row.id: [] for row in rows}
        for run in past.runs(list(lanes)):
            lanes[run.experiment].append(run.pipeline)
    finally:
        past.close()
    if as_json:
        return print_json([{**dataclasses.asdict(row), "pipelines": lanes[row.id]} for row in rows])
    print_table(
        ("experiment", "when", "status", "model", "workload", "lanes", "tags"),
        [
            (r.id, _when(r.submitted), r.status, r.model or "", r.workload or "", "\n".join(lanes[r.id]), ", ".join(r.tags))
            for r in rows
        ],
    )


def _when(t: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(t)) if t else ""


def show_experiment(data: DataDir, experiment: str, as_json: bool) -> None:
    """One experiment as after its run.

    Raises:
        StoreError: there is none with this id.
    """
    path = data.spool(Path(experiment).name)
    events = list(read_spool(path))
    if not events:
        raise StoreError(f"there is no experiment {experiment!r} in {data.root}; `pareto-studio history` lists what there is")
    report = document(events)
    if as_json:
        return print_json(report)
    print_result(report)
    for remark in (report["experiment"]["message"], *remarks(report)):
        if remark:
            Console(stderr=True, highlight=False).print(remark, markup=False)


def show_sql(data: DataDir, sql: str, as_json: bool) -> None:
    """The answer to one query.

    Raises:
        SqlError: it is refused, wrong, too slow or too large.
    """
    from studio_state.history import History
    from studio_state.sqlbox import run_sql

    with tempfile.TemporaryDirectory(prefix="pareto-studio-") as folder:
        past = History.in_memory(data)
        try:
            past.snapshot(Path(folder))
        finally:
            past.close()
        result = run_sql(sql, Path(folder))
    if as_json:
        return print_json([dict(zip(result.columns, row, strict=True)) for row in result.rows])
    print_table(result.columns, [["" if v is None else str(v) for v in row] for row in result.rows])


def export_experiment(data: DataDir, experiment: str, card: Path | None, script: Path | None, lane: int) -> None:
    """A recorded experiment as files.

    Raises:
        SpecError: nothing is asked for, or no script can be made of the lane.
        StoreError: no such experiment, or a file cannot be written.
    """
    if card is None and script is None:
        raise SpecError("nothing to write: give --card FILE, --script FILE, or both")
    try:
        if card is not None:
            card.write_text(export_card(data, experiment).text(), encoding="utf-8")
        if script is not None:
            if not data.spool(experiment).is_file():
                raise StoreError(f"there is no experiment {experiment!r} in {data.root}; see `pareto-studio history`")
            text = export_script(read_spool(data.spool(experiment)), lane, Catalog.load(), script.name)
            script.write_text(text, encoding="utf-8")
    except OSError as e:
        raise StoreError(f"the file cannot be written: {e}; choose another place") from e
