"""From spools and journal to tables: the one way in which anything enters the database.

The live store, a rebuild and the CLI's in-memory history all go through :class:`Ingester`, so they
cannot differ. How far each spool was read is stored in the same transaction as its rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb

from studio_state import events as ev
from studio_state.journal import JournalState, read_journal, replay
from studio_state.paths import cannot
from studio_state.spool import read_spool

BATCH_EVENTS = 20_000
_EXPERIMENT = (
    "id", "status", "digest", "origin", "owner", "model", "family", "workload", "device", "dtype", "threads", "batch", "seed",
    "reference", "lanes", "submitted", "started", "ended", "error", "spec", "environment", "model_info", "estimate",
)  # fmt: skip
_RUN = ("experiment", "lane", "pipeline", "steps", "policies", "effective", "status", "flags", "message", "interleaved")
_OPEN = ("queued", "running")
Row = dict[str, Any]


@dataclass(frozen=True)
class Position:
    """How far a spool has been read."""

    last_seq: int = -1
    bytes: int = 0
    skipped: int = 0


@dataclass
class _Batch:
    """Rows of some events, to be written in one transaction."""

    experiments: dict[str, Row] = field(default_factory=dict)
    runs: dict[str, dict[int, Row]] = field(default_factory=dict)
    added: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    positions: dict[str, Position] = field(default_factory=dict)
    size: int = 0

    def add(self, table: str, *row: Any) -> None:
        """Append one row to a table."""
        self.added.setdefault(table, []).append(row)

    def run(self, experiment: str, lane: int) -> Row:
        """The row of a lane, made if it is not there."""
        lanes = self.runs.setdefault(experiment, {})
        if lane not in lanes:
            fresh = {"experiment": experiment, "lane": lane, "status": "queued", "flags": [], "policies": []}
            lanes[lane] = dict.fromkeys(_RUN) | fresh
        return lanes[lane]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def fold(batch: _Batch, e: ev.Event) -> None:
    """Put what one event says into the rows of a batch. Phases, items, tokens, pictures and expert loads stay in the spool alone."""
    row, x = batch.experiments[e.experiment], e.experiment
    match e:
        case ev.Metric():
            batch.add("metrics", x, e.seq, e.lane, e.name, e.item, e.repeat, e.value, e.source, e.n, e.low, e.high)
        case ev.Ratio():
            batch.add("ratios", x, e.seq, e.lane, e.name, e.value, e.low, e.high, e.n)
        case ev.Output():
            batch.add("outputs", x, e.seq, e.lane, e.item, e.repeat, e.kind, e.text, e.expected, e.correct, _json(e.data))
        case ev.Kept():
            batch.add("kept", x, e.seq, e.lane, e.item, e.share, e.layers)
        case ev.Note():
            batch.add("messages", x, e.seq, e.t, e.level, e.lane, e.text)
        case ev.Submitted():
            _submitted(batch, row, e)
        case ev.Started():
            row |= {"started": e.t, "environment": _json(e.environment)}
            row["status"] = "running" if row["status"] in _OPEN else row["status"]
        case ev.ModelLoaded():
            estimate = e.estimate.model_dump_json() if e.estimate else None
            row |= {"family": e.info.family, "model_info": e.info.model_dump_json(), "estimate": estimate}
        case ev.LaneStarted():
            batch.run(x, e.lane).update(effective=e.order, status="running", interleaved=e.interleaved)
        case ev.LaneFinished():
            batch.run(x, e.lane).update(status=e.status, flags=list(e.flags), message=e.message, interleaved=e.interleaved)
        case ev.Finished():
            _ended(batch, row, e, "finished", "failed", "the worker reported no end of this lane")
        case ev.Failed():
            _ended(batch, row, e, "failed", "failed", e.message)
        case ev.Cancelled():
            _ended(batch, row, e, "cancelled", "cancelled", "")


def _submitted(batch: _Batch, row: Row, e: ev.Submitted) -> None:
    spec = e.spec
    row |= {
        "digest": spec.digest(), "origin": e.origin, "owner": e.owner, "model": spec.model, "workload": spec.workload.id,
        "device": spec.device, "dtype": spec.dtype, "threads": spec.threads, "batch": spec.batch, "seed": spec.seed,
        "reference": spec.reference, "lanes": len(spec.lanes), "submitted": e.t, "spec": spec.model_dump_json(),
    }  # fmt: skip
    for lane, pipeline in enumerate(spec.lanes):
        batch.run(e.experiment, lane).update(
            pipeline=pipeline.text(), steps=pipeline.model_dump_json(), policies=[s.policy for s in pipeline.steps]
        )


def _ended(batch: _Batch, row: Row, e: ev.Event, status: str, lane_status: str, message: str) -> None:
    """The first terminal event counts; lanes that have not ended end with it."""
    if row["status"] not in _OPEN:
        return
    row |= {"status": status, "ended": e.t, "error": message if status == "failed" else None}
    for run in batch.runs.get(e.experiment, {}).values():
        if run["status"] in _OPEN:
            run.update(status=lane_status, message=message)


class Ingester:
    """Reads spools and journal into a database. Belongs to one thread.

    Args:
        con: a connection (or cursor) to a migrated database.

    Attributes:
        refused: spool -> why its lines cannot be stored; the others are stored all the same.
    """

    def __init__(self, con: duckdb.DuckDBPyConnection):
        self.con = con
        self.refused: dict[Path, str] = {}
        self._journal_state, self._journal_offset = JournalState(), -1
        self.reload()

    def reload(self) -> None:
        """Read from the database how far each spool was read."""
        rows = self.con.execute("SELECT experiment, last_seq, bytes, skipped FROM ingested").fetchall()
        self.positions = {x: Position(*rest) for x, *rest in rows}

    def behind(self, folder: Path, newest: int | None = None) -> list[Path]:
        """Spools with bytes that were not read yet, oldest first; ``newest``: look only at that many."""
        try:
            with os.scandir(folder) as found:
                entries = sorted((e for e in found if e.name.endswith(".jsonl")), key=lambda e: e.name)
            if newest is not None:
                entries = entries[max(0, len(entries) - newest) :]
            grown = [
                Path(e.path)
                for e in entries
                if e.stat().st_size != self.positions.get(e.name[: -len(".jsonl")], Position()).bytes
            ]
        except FileNotFoundError:
            return []
        except OSError as e:
            raise cannot(f"read the records in {folder}", e) from e
        return [p for p in grown if p not in self.refused]

    def _position(self, path: Path) -> Position:
        return self.positions.get(path.stem, Position())

    def spools(self, paths: Sequence[Path]) -> None:
        """Store what is new in these spools.

        Raises:
            duckdb.Error: the database cannot be written; nothing of the failed batch is stored.
        """
        try:
            self._spools(paths)
        except (duckdb.DataError, duckdb.ProgrammingError, OverflowError, UnicodeError, TypeError) as error:
            if len(paths) == 1:  # numbers or texts that no column can hold, put there by another program
                self.refused[paths[0]] = (
                    f"the record {paths[0].name} holds values that cannot be stored: {str(error).splitlines()[0]}"
                )
                return
            for path in paths:
                self.spools([path])

    def _spools(self, paths: Iterable[Path]) -> None:
        batch = _Batch()
        for path in paths:
            start = self._position(path)
            self._recall(batch, path.stem, start)
            reader = read_spool(path, since=start.last_seq + 1, offset=start.bytes)
            for event in reader:
                fold(batch, event)
                batch.size += 1
                if batch.size >= BATCH_EVENTS:
                    batch.positions[path.stem] = Position(event.seq, reader.offset, start.skipped + reader.skipped)
                    self._write(batch)
                    batch = _Batch({path.stem: batch.experiments[path.stem]}, {path.stem: batch.runs.get(path.stem, {})})
            end = Position(reader.last, reader.offset, start.skipped + reader.skipped)
            if end != self._position(path):
                batch.positions[path.stem] = end
        self._write(batch)

    def _recall(self, batch: _Batch, experiment: str, start: Position) -> None:
        """Put the stored rows of an experiment into the batch, or fresh ones."""
        batch.experiments[experiment] = dict.fromkeys(_EXPERIMENT) | {"id": experiment, "status": "queued", "lanes": 0}
        if start.last_seq < 0:
            return
        for values in self.con.execute(f"SELECT {', '.join(_EXPERIMENT)} FROM experiments WHERE id = ?", [experiment]).fetchall():
            batch.experiments[experiment] = dict(zip(_EXPERIMENT, values, strict=True))
        for values in self.con.execute(f"SELECT {', '.join(_RUN)} FROM runs WHERE experiment = ?", [experiment]).fetchall():
            row = dict(zip(_RUN, values, strict=True))
            batch.runs.setdefault(experiment, {})[row["lane"]] = row

    def _write(self, batch: _Batch) -> None:
        """One transaction: replace rows that change, append the others, note how far the spools were read."""
        if not batch.positions:
            return
        ids = [x for x, p in batch.positions.items() if p.last_seq >= 0]
        known = [x for x in batch.positions if x in self.positions]
        runs = [r for x in batch.positions for r in batch.runs.get(x, {}).values()]
        self.con.execute("BEGIN")
        try:
            if known:
                for table, key in (("experiments", "id"), ("runs", "experiment"), ("ingested", "experiment")):
                    self.con.execute(f"DELETE FROM {table} WHERE {key} IN (SELECT unnest(?::VARCHAR[]))", [known])
            self._append("experiments", [tuple(batch.experiments[x][c] for c in _EXPERIMENT) for x in ids])
            self._append("runs", [tuple(r[c] for c in _RUN) for r in runs])
            for table, rows in batch.added.items():
                self._append(table, rows)
            self._append("ingested", [(x, p.last_seq, p.bytes, p.skipped) for x, p in batch.positions.items()])
            self.con.execute("COMMIT")
        except BaseException:
            self.con.execute("ROLLBACK")
            raise
        self.positions.update(batch.positions)

    def _append(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if rows:
            with self.con.appender(table) as out:
                out.append_rows(rows)

    def journal(self, path: Path) -> None:
        """Bring the journal's tables up to date.

        Raises:
            duckdb.Error: the database cannot be written.
        """
        found = read_journal(path, max(self._journal_offset, 0))
        if found.offset == self._journal_offset:
            return
        state = replay(found.entries, self._journal_state)
        tables: dict[str, list[tuple[Any, ...]]] = {
            "tags": [(e.experiment, e.tag, e.t, e.by) for e in state.tags.values()],
            "notes": [(e.experiment, e.lane, e.text, e.t, e.by) for e in state.notes.values()],
            "deletions": [(e.experiment, e.t, e.by) for e in state.deletions.values()],
            "imports": [(e.id, e.experiment, e.source, e.digest, e.t, e.by) for e in state.imports.values()],
            "verdicts": [
                (e.experiment, e.claim, e.verdict, e.text, _json(e.numbers), e.t, e.by) for e in state.verdicts.values()
            ],
        }
        self.con.execute("BEGIN")
        try:
            for table, rows in tables.items():
                self.con.execute(f"DELETE FROM {table}")
                self._append(table, rows)
            self.con.execute("COMMIT")
        except BaseException:
            self.con.execute("ROLLBACK")
            raise
        self._journal_offset = found.offset
