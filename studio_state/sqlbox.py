"""SQL by the user, in a box: a short-lived process over a copy of the record.

The copy is loaded into memory; then files, extensions, Python variables and the configuration are locked.
Whatever the query does, it can change and read nothing else. One SELECT, a few seconds, a bounded result.

Views: ``experiments runs metrics ratios outputs kept messages tags notes verdicts imports`` (deleted
experiments left out, times as timestamps), and ``results``: one row per lane and metric of whole lanes,
with model, workload, pipeline, tags and the ratio to the reference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from studio_state.errors import SqlError
from studio_state.migrations import TABLES

MAX_RESULT_BYTES = 16_000_000
_LOAD_S = 60.0
_MEMORY = "512MB"
_GRACE_S = 1.0  # between asking the query to stop and ending the process
_TOO_SLOW = 3
_LOCKDOWN = (
    "SET temp_directory = ''",
    "SET enable_external_access = false",
    "SET python_enable_replacements = false",
    "SET autoload_known_extensions = false",
    "SET autoinstall_known_extensions = false",
    "SET allow_community_extensions = false",
    "SET lock_configuration = true",
)
_OF_KEPT = "WHERE {0} NOT IN (SELECT experiment FROM record.deletions)"
_TIMES = {
    "experiments": ("submitted", "started", "ended"), "tags": ("t",), "notes": ("t",), "imports": ("t",), "verdicts": ("t",), "messages": ("t",),
}  # fmt: skip
_RESULTS = """
    CREATE VIEW results AS
    SELECT m.experiment, e.submitted, e.model, e.family, e.workload, e.device, e.dtype, e.threads, e.batch, e.seed, e.status AS experiment_status,
        m.lane, r.pipeline, r.policies, r.status, m.name AS metric, m.value, m.low, m.high, m.n, m.source,
        q.value AS ratio, q.low AS ratio_low, q.high AS ratio_high, q.n AS ratio_n,
        (SELECT list(tag ORDER BY tag) FROM tags t WHERE t.experiment = m.experiment) AS tags
    FROM metrics m JOIN experiments e ON e.id = m.experiment
    LEFT JOIN runs r ON r.experiment = m.experiment AND r.lane = m.lane
    LEFT JOIN ratios q ON q.experiment = m.experiment AND q.lane = m.lane AND q.name = m.name
    WHERE m.item IS NULL
"""


@dataclass(frozen=True)
class SqlResult:
    """What a query gave.

    Attributes:
        columns: names, as the query gave them.
        types: DuckDB's type of each column.
        rows: values; times, decimals and bytes as text.
    """

    columns: list[str]
    types: list[str]
    rows: list[list[Any]]


def run_sql(sql: str, snapshot: Path, seconds: float = 5, rows: int = 10_000) -> SqlResult:
    """Run one query over a snapshot (``History.snapshot``).

    Args:
        sql: one SELECT (also WITH, VALUES, DESCRIBE, SHOW, SUMMARIZE, EXPLAIN).
        snapshot: folder of Parquet files.
        seconds: time for the query itself.
        rows: largest result.

    Raises:
        SqlError: it is refused, wrong, too slow or too large; one sentence.
    """
    request = json.dumps({"sql": sql, "snapshot": str(snapshot), "seconds": seconds, "rows": rows})
    package = str(Path(__file__).resolve().parents[1])
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "TMPDIR", "TEMP")}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "studio_state.sqlbox"], input=request, capture_output=True, text=True,
            encoding="utf-8", timeout=seconds + _LOAD_S, env={**env, "PYTHONPATH": package, "PYTHONUTF8": "1"}, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as e:
        raise SqlError(_slow(seconds)) from e
    if done.returncode == _TOO_SLOW:
        raise SqlError(_slow(seconds))
    if done.returncode != 0 or not done.stdout:
        raise SqlError("the query used up the memory or time it may have; select fewer rows or columns, or add a LIMIT")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise SqlError(answer["error"])
    return SqlResult(answer["columns"], answer["types"], answer["rows"])


def _slow(seconds: float) -> str:
    return f"the query took longer than {seconds:g} s and was stopped; narrow it down with WHERE or LIMIT"


# -- inside the box


def load(snapshot: Path) -> duckdb.DuckDBPyConnection:
    """The snapshot in memory, with its views, locked."""
    con = duckdb.connect(":memory:", config={"memory_limit": _MEMORY, "threads": "2", "autoinstall_known_extensions": "false"})
    con.execute("CREATE SCHEMA record")
    for table in TABLES:
        con.execute(f"CREATE TABLE record.{table} AS SELECT * FROM read_parquet(?)", [str(snapshot / f"{table}.parquet")])
    for table in (t for t in TABLES if t not in ("ingested", "deletions")):
        times = ", ".join(f"make_timestamp((1e6 * {c})::BIGINT) AS {c}" for c in _TIMES.get(table, ()))
        kept = _OF_KEPT.format("id" if table == "experiments" else "experiment")
        con.execute(f"CREATE VIEW {table} AS SELECT * {f'REPLACE ({times})' if times else ''} FROM record.{table} {kept}")
    con.execute(_RESULTS)
    for setting in _LOCKDOWN:
        con.execute(setting)
    return con


def check(sql: str) -> str:
    """The one statement in a text.

    Raises:
        SqlError: there is none, there are several, or it is not a reading one.
    """
    try:
        found = duckdb.extract_statements(sql)
    except duckdb.Error as e:
        raise SqlError(f"this is not SQL that DuckDB understands: {_line(e)}") from e
    allowed = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
    if len(found) != 1:
        raise SqlError(f"one SELECT at a time: this text holds {len(found)} statements")
    if found[0].type not in allowed:
        kind = "a statement in several steps (such as PIVOT without IN)" if found[0].type.name == "MULTI" else found[0].type.name
        raise SqlError(f"only reading is allowed here: {kind} is refused; write one SELECT")
    return str(found[0].query)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run a request of :func:`run_sql`; errors become ``{"error": sentence}``."""
    try:
        sql = check(request["sql"])
        con = load(Path(request["snapshot"]))
    except SqlError as e:
        return {"error": str(e)}
    except duckdb.Error as e:
        return {"error": f"the copy of the record in {request['snapshot']} cannot be loaded: {_line(e)}"}
    try:
        return _run(con, sql, request["seconds"], request["rows"])
    except SqlError as e:
        return {"error": str(e)}
    except duckdb.InterruptException:
        return {"error": _slow(request["seconds"])}
    except (duckdb.OutOfMemoryException, MemoryError):
        return {"error": f"the query needs more than {_MEMORY} of memory; select fewer rows or columns"}
    except (duckdb.PermissionException, duckdb.InvalidInputException) as e:
        if "disabled" in str(e) or "locked" in str(e):
            return {
                "error": "files, the network, extensions and settings cannot be used in queries; only the views of the record"
            }
        return {"error": f"the query failed: {_line(e)}"}
    except duckdb.Error as e:
        return {"error": f"the query failed: {_line(e)}"}


def _run(con: duckdb.DuckDBPyConnection, sql: str, seconds: float, rows: int) -> dict[str, Any]:
    timers = threading.Timer(seconds, con.interrupt), threading.Timer(seconds + _GRACE_S, os._exit, (_TOO_SLOW,))
    for timer in timers:
        timer.start()
    try:
        cursor = con.execute(sql)
        columns = cursor.description or []
        found = cursor.fetchmany(rows + 1)
        if len(found) > rows:
            raise SqlError(f"the query gives more than {rows} rows; add a LIMIT or aggregate")
        text = json.dumps([[_plain(v) for v in r] for r in found])
    finally:
        for timer in timers:
            timer.cancel()
    if len(text) > MAX_RESULT_BYTES:
        raise SqlError(f"the result is larger than {MAX_RESULT_BYTES // 1_000_000} MB; select fewer rows or columns")
    return {"columns": [c[0] for c in columns], "types": [str(c[1]) for c in columns], "rows": json.loads(text)}


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; infinities and NaN become None."""
    if isinstance(value, float):
        return value if abs(value) != float("inf") and value == value else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (bytes, bytearray)):
        return value.hex()
    return str(value)


def _line(error: BaseException) -> str:
    lines = [x.strip() for x in str(error).splitlines() if x.strip()]
    return lines[0] if lines else type(error).__name__


def _limit_process(bytes_: int = 4 << 30) -> None:
    """A hard bound on memory, where the system has one."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    limit: Callable[..., None] = resource.setrlimit
    limit(resource.RLIMIT_AS, (bytes_, bytes_))
    limit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Read a request from stdin, write the answer to stdout."""
    _limit_process()
    sys.stdout.write(json.dumps(answer(json.loads(sys.stdin.read()))))


if __name__ == "__main__":
    main()
