"""Reading the record: one typed API for the screen and the CLI.

:class:`studio_state.store.Store` (the studio's file) and :meth:`History.in_memory` (the CLI's) answer the
same questions. Every read uses a cursor of its own, so any thread may ask at any time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import duckdb

from studio_state import database
from studio_state.errors import StoreError
from studio_state.events import Event
from studio_state.experiment import MemoryEstimate
from studio_state.gate import Gate
from studio_state.ingest import Ingester
from studio_state.migrations import TABLES, migrate
from studio_state.paths import DataDir
from studio_state.spool import is_alive, read_spool
from studio_state.store_rows import (
    ExperimentRow,
    KeptRow,
    MessageRow,
    MetricRow,
    NoteRow,
    OutputRow,
    RatioRow,
    RunRow,
    VerdictRow,
)

R = TypeVar("R")
_STATUS = "CASE WHEN {0}.status IN ('queued', 'running') AND {1} IN (SELECT unnest($dead::VARCHAR[])) THEN 'interrupted' ELSE {0}.status END"
_FILTERS = {
    "model": "e.model = $model",
    "workload": "e.workload = $workload",
    "device": "e.device = $device",
    "family": "e.family = $family",
    "origin": "e.origin = $origin",
    "owner": "e.owner = $owner",
    "digest": "e.digest = $digest",
    "tag": "e.id IN (SELECT experiment FROM tags WHERE tag = $tag)",
    "policy": "e.id IN (SELECT experiment FROM runs WHERE list_contains(policies, $policy))",
    "status": f"{_STATUS.format('e', 'e.id')} = $status",
    "text": "(contains(lower(concat_ws(' ', e.id, e.model, e.workload)), lower($text))"
    " OR e.id IN (SELECT experiment FROM runs WHERE contains(lower(pipeline), lower($text)))"
    " OR e.id IN (SELECT experiment FROM tags WHERE contains(lower(tag), lower($text)))"
    " OR e.id IN (SELECT experiment FROM notes WHERE contains(lower(text), lower($text))))",
}
_NOT_DELETED = "e.id NOT IN (SELECT experiment FROM deletions)"


class History:
    """Questions about the record. May be used from any thread.

    Args:
        data: the data directory that the record belongs to.
        con: an open database with the record's tables.
        notes: sentences about what happened on the way.
    """

    def __init__(self, data: DataDir, con: duckdb.DuckDBPyConnection, notes: Sequence[str] = ()):
        self.data, self.notes = data, list(notes)
        self._con: duckdb.DuckDBPyConnection | None = con
        self._gate = Gate()

    @classmethod
    def in_memory(cls, data: DataDir, limit: int | None = None) -> History:
        """Build it in memory from the spools and the journal, without touching the studio's database file.

        Args:
            limit: only the newest experiments, by id; None = all.

        Raises:
            StoreError: the data directory cannot be read.
        """
        con = database.connect(database.MEMORY)
        migrate(con)
        ingester = Ingester(con)
        ingester.spools(ingester.behind(data.spools, newest=limit))
        ingester.journal(data.journal)
        return History(data, con, list(ingester.refused.values()))

    # -- experiments

    def experiments(
        self, limit: int = 100, offset: int = 0, *, deleted: bool | None = False, **filters: str | None
    ) -> list[ExperimentRow]:
        """Experiments, newest first.

        Args:
            limit, offset: the page.
            deleted: False = only those that are not deleted, True = only deleted ones, None = both.
            filters: ``status model workload device family origin owner digest tag policy text``; None = any.
                ``policy``: id of a policy in any lane. ``text``: found in id, model, workload, pipelines, tags or notes.

        Raises:
            StoreError: the database cannot be read.
            TypeError: there is no such filter.
        """
        with self._cursor() as cursor:
            where, values = self._where(cursor, deleted, filters)
            return self._experiment_rows(cursor, where, values | {"limit": limit, "offset": offset})

    def count(self, *, deleted: bool | None = False, **filters: str | None) -> int:
        """How many experiments the filters of :meth:`experiments` leave."""
        with self._cursor() as cursor:
            where, values = self._where(cursor, deleted, filters)
            values = {k: v for k, v in values.items() if f"${k}" in where}
            return int(cursor.execute(f"SELECT count(*) FROM experiments e WHERE {where}", values).fetchall()[0][0])

    def experiment(self, experiment: str) -> ExperimentRow | None:
        """One experiment, deleted or not; None if there is none."""
        return next(iter(self.experiments_of([experiment])), None)

    def experiments_of(self, ids: Sequence[str]) -> list[ExperimentRow]:
        """The experiments with these ids, deleted or not, newest first; those that do not exist are left out."""
        with self._cursor() as cursor:
            values = {"dead": self._dead(cursor, ids), "ids": list(ids), "limit": len(ids), "offset": 0}
            return self._experiment_rows(cursor, "e.id IN (SELECT unnest($ids::VARCHAR[]))", values)

    def _where(
        self, cursor: duckdb.DuckDBPyConnection, deleted: bool | None, filters: dict[str, str | None]
    ) -> tuple[str, dict[str, Any]]:
        unknown = filters.keys() - _FILTERS.keys()
        if unknown:
            raise TypeError(f"no filter {', '.join(sorted(unknown))}; allowed: {', '.join(_FILTERS)}")
        given = {k: v for k, v in filters.items() if v is not None}
        clauses = [_FILTERS[k] for k in given]
        if deleted is not None:
            clauses.append(f"NOT ({_NOT_DELETED})" if deleted else _NOT_DELETED)
        return " AND ".join(clauses) or "true", {**given, "dead": self._dead(cursor)}

    def _experiment_rows(self, cursor: duckdb.DuckDBPyConnection, where: str, values: dict[str, Any]) -> list[ExperimentRow]:
        rows = cursor.execute(
            f"""
            WITH page AS (SELECT e.id FROM experiments e WHERE {where} ORDER BY submitted DESC NULLS LAST, id DESC LIMIT $limit OFFSET $offset)
            SELECT e.id, {_STATUS.format("e", "e.id")}, digest, origin, owner, model, family, workload, device, dtype, threads, batch,
                seed, reference, lanes, submitted, started, ended, error, spec, environment, model_info, estimate,
                (SELECT list(tag ORDER BY tag) FROM tags WHERE experiment = e.id),
                (SELECT any_value(text) FROM notes WHERE experiment = e.id AND lane IS NULL),
                e.id IN (SELECT experiment FROM deletions)
            FROM experiments e WHERE e.id IN (SELECT id FROM page) ORDER BY submitted DESC NULLS LAST, id DESC
            """,
            values,
        ).fetchall()
        return [ExperimentRow(*[*r[:19], *map(_parse, r[19:23]), tuple(r[23] or ()), r[24] or "", r[25]]) for r in rows]

    def _dead(self, cursor: duckdb.DuckDBPyConnection, among: Sequence[str] | None = None) -> list[str]:
        """Experiments without an end that no living process records, and of whose spool nothing is left to read."""
        found = cursor.execute(
            "SELECT id FROM experiments WHERE status IN ('queued', 'running')"
            + ("" if among is None else " AND id IN (SELECT unnest(?::VARCHAR[]))"),
            [] if among is None else [list(among)],
        ).fetchall()
        silent = [x for (x,) in found if not is_alive(self.data.spool(x))]
        if not silent:
            return []
        read = cursor.execute(
            "SELECT experiment, bytes FROM ingested WHERE experiment IN (SELECT unnest(?::VARCHAR[]))", [silent]
        ).fetchall()
        return [x for x, size in read if not _has_more(self.data.spool(x), size)]

    # -- what an experiment left behind

    def runs(self, experiment: str | Sequence[str]) -> list[RunRow]:
        """Lanes of one experiment or of several, in order."""
        ids = _ids(experiment)
        with self._cursor() as cursor:
            rows = cursor.execute(
                f"SELECT experiment, lane, pipeline, steps, effective, {_STATUS.format('r', 'r.experiment')}, flags, message, interleaved "
                "FROM runs r WHERE experiment IN (SELECT unnest($ids::VARCHAR[])) ORDER BY experiment, lane",
                {"ids": ids, "dead": self._dead(cursor, ids)},
            ).fetchall()
        return [RunRow(r[0], r[1], r[2] or "", _parse(r[3]) or {}, r[4], r[5], tuple(r[6] or ()), r[7] or "", r[8]) for r in rows]

    def metrics(self, experiment: str | Sequence[str], *, name: str | None = None, items: bool = True) -> list[MetricRow]:
        """Values in the order in which they came. ``name``: only this metric; ``items=False``: only those of whole lanes."""
        more = (" AND name = $name" if name else "") + ("" if items else " AND item IS NULL")
        return self._rows(MetricRow, "metrics", experiment, more, {"name": name} if name else {})

    def ratios(self, experiment: str | Sequence[str]) -> list[RatioRow]:
        """Ratios to the reference lane, in the order in which they came."""
        return self._rows(RatioRow, "ratios", experiment)

    def outputs(self, experiment: str | Sequence[str]) -> list[OutputRow]:
        """What the items ended in, in the order in which they came."""
        return self._rows(OutputRow, "outputs", experiment)

    def kept(self, experiment: str | Sequence[str]) -> list[KeptRow]:
        """Eviction maps, in the order in which they came."""
        return self._rows(KeptRow, "kept", experiment)

    def messages(self, experiment: str | Sequence[str]) -> list[MessageRow]:
        """Remarks of the worker, in the order in which they came."""
        return self._rows(MessageRow, "messages", experiment)

    def lane_notes(self, experiment: str | Sequence[str]) -> list[NoteRow]:
        """Notes that a person wrote on single lanes."""
        return self._rows(NoteRow, "notes", experiment, " AND lane IS NOT NULL", order="lane")

    def verdicts(self, experiment: str | Sequence[str]) -> list[VerdictRow]:
        """Verdicts on claims, by claim."""
        return self._rows(VerdictRow, "verdicts", experiment, order="claim")

    def verdicts_on(self, claim: str) -> list[VerdictRow]:
        """Every verdict on a claim, newest first; one that rests on several experiments comes once for each of them."""
        with self._cursor() as cursor:
            rows = cursor.execute(
                "SELECT experiment FROM verdicts WHERE claim = ? ORDER BY t DESC, experiment", [claim]
            ).fetchall()
        found = {v.experiment: v for v in self.verdicts([e for (e,) in rows]) if v.claim == claim}
        return [found[e] for (e,) in rows if e in found]

    def memory_needs(self, newest: int = 500) -> list[tuple[MemoryEstimate, int, float]]:
        """Of the newest experiments' lanes that were measured: what was estimated before loading, lane, peak in bytes."""
        with self._cursor() as cursor:
            rows = cursor.execute(
                f"""
                WITH recent AS (SELECT id, estimate FROM experiments e WHERE estimate IS NOT NULL AND {_NOT_DELETED}
                    ORDER BY submitted DESC NULLS LAST, id DESC LIMIT $newest)
                SELECT any_value(r.estimate), m.lane, arg_max(m.value, m.seq) FROM metrics m JOIN recent r ON r.id = m.experiment
                WHERE m.name = 'peak_memory_bytes' AND m.item IS NULL AND m.value > 0 GROUP BY m.experiment, m.lane
                """,
                {"newest": newest},
            ).fetchall()
        return [(MemoryEstimate.model_validate_json(estimate), lane, peak) for estimate, lane, peak in rows]

    def tags(self) -> list[str]:
        """All tags in use, sorted."""
        with self._cursor() as cursor:
            return [t for (t,) in cursor.execute("SELECT DISTINCT tag FROM tags ORDER BY tag").fetchall()]

    def values(self, column: Literal["model", "workload", "device"]) -> list[str]:
        """What a column of the experiments holds, sorted; for choosing a filter."""
        with self._cursor() as cursor:
            found = cursor.execute(
                f"SELECT DISTINCT {column} FROM experiments e WHERE {column} IS NOT NULL AND {_NOT_DELETED} ORDER BY 1"
            ).fetchall()
        return [v for (v,) in found]

    def _rows(self, kind: type[R], table: str, experiment: str | Sequence[str], more: str = "",
              values: dict[str, Any] | None = None, order: str = "seq") -> list[R]:  # fmt: skip
        columns = list(kind.__dataclass_fields__)  # type: ignore[attr-defined]
        parsed = [i for i, c in enumerate(columns) if c in ("data", "numbers")]
        with self._cursor() as cursor:
            rows = cursor.execute(
                f"SELECT {', '.join(columns)} FROM {table} WHERE experiment IN (SELECT unnest($ids::VARCHAR[])){more} "
                f"ORDER BY experiment, {order}",
                {"ids": _ids(experiment), **(values or {})},
            ).fetchall()
        if not parsed:
            return [kind(*r) for r in rows]
        return [kind(*(_parse(v) if i in parsed else v for i, v in enumerate(r))) for r in rows]

    def events(self, experiment: str, since: int = 0) -> Iterator[Event]:
        """Events of an experiment with ``seq >= since``, from its spool; none if there is no such experiment."""
        return iter(read_spool(self.data.spool(experiment), since))

    # -- the whole record

    def snapshot(self, folder: Path) -> Path:
        """Write every table as Parquet into a folder, for :func:`studio_state.sqlbox.run_sql`; returns the folder.

        Raises:
            StoreError: it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with self._cursor() as cursor:
            cursor.execute("BEGIN")  # one moment for all tables
            dead = ", ".join(f"'{x}'" for x in self._dead(cursor)) or "''"  # ids are safe names
            for table in TABLES:
                key = {"experiments": "id", "runs": "experiment"}.get(table)
                status = f"REPLACE (CASE WHEN status IN ('queued', 'running') AND {key} IN ({dead}) THEN 'interrupted' ELSE status END AS status)"
                target = str(folder / f"{table}.parquet").replace("'", "''")
                cursor.execute(f"COPY (SELECT * {status if key else ''} FROM {table}) TO '{target}' (FORMAT parquet)")
            cursor.execute("COMMIT")
        return folder

    def table(self, name: str) -> list[tuple[Any, ...]]:
        """All rows of a table in a fixed order; for comparing records."""
        if name not in TABLES:
            raise StoreError(f"the record has no table {name!r}; it has {', '.join(TABLES)}")
        with self._cursor() as cursor:
            return sorted(cursor.execute(f"SELECT * FROM {name}").fetchall(), key=repr)

    @contextmanager
    def _cursor(self) -> Iterator[duckdb.DuckDBPyConnection]:
        with self._gate.reading():
            if self._con is None:
                raise StoreError("the record is closed; open it again")
            try:
                with self._con.cursor() as cursor:
                    yield cursor
            except duckdb.Error as e:
                raise database.cannot_read(e) from e

    def close(self) -> None:
        """Let the database go; reads fail afterwards."""
        with self._gate.alone():
            if self._con is not None:
                self._con.close()
                self._con = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _ids(experiment: str | Sequence[str]) -> list[str]:
    return [experiment] if isinstance(experiment, str) else list(experiment)


def _parse(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _has_more(spool: Path, read: int) -> bool:
    """True if complete lines follow byte ``read``."""
    try:
        if spool.stat().st_size <= read:
            return False
        with open(spool, "rb") as file:
            file.seek(read)
            return b"\n" in file.read()
    except OSError:
        return False
