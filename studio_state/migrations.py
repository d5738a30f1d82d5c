"""The tables of the record, as steps in order.

A database remembers which steps it has taken in the table ``migrations``; :func:`migrate` takes the
others. A step never changes once it is released. Where a step needs data that only the spools have, it
empties ``ingested``: the store then reads everything again.

Events (from the spools)

==============  ====================================================================================
experiments     one row each: what was asked, status, times, error, environment, model, estimate
runs            one row a lane: pipeline (text, JSON, policy ids), effective order, status, flags
metrics         values; ``item`` NULL = of the whole lane, then with n, low, high where known
ratios          lane / reference with its 95 % interval
outputs         what an item ended in
kept            eviction maps: share kept per prompt token, per layer as digits
messages        remarks of the worker
ingested        per spool: last seq stored, bytes read, lines passed over
==============  ====================================================================================

Journal: tags, notes, deletions, imports, verdicts. Times are unix seconds (UTC).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import duckdb

from studio_state.errors import StoreError

Migration = Callable[[duckdb.DuckDBPyConnection], object]

EVENT_TABLES = ("experiments", "runs", "metrics", "ratios", "outputs", "kept", "messages", "ingested")
JOURNAL_TABLES = ("tags", "notes", "deletions", "imports", "verdicts")
TABLES = EVENT_TABLES + JOURNAL_TABLES


def m001_record(con: duckdb.DuckDBPyConnection) -> None:
    """All tables of the first version."""
    con.execute(
        """
        CREATE TABLE experiments (
            id VARCHAR, status VARCHAR, digest VARCHAR, origin VARCHAR, owner VARCHAR, model VARCHAR, family VARCHAR,
            workload VARCHAR, device VARCHAR, dtype VARCHAR, threads BIGINT, batch BIGINT, seed BIGINT, reference BIGINT,
            lanes BIGINT, submitted DOUBLE, started DOUBLE, ended DOUBLE, error VARCHAR,
            spec JSON, environment JSON, model_info JSON, estimate JSON);
        CREATE TABLE runs (
            experiment VARCHAR, lane BIGINT, pipeline VARCHAR, steps JSON, policies VARCHAR[], effective VARCHAR,
            status VARCHAR, flags VARCHAR[], message VARCHAR, interleaved BOOLEAN);
        CREATE TABLE metrics (
            experiment VARCHAR, seq BIGINT, lane BIGINT, name VARCHAR, item VARCHAR, repeat BIGINT, value DOUBLE,
            source VARCHAR, n BIGINT, low DOUBLE, high DOUBLE);
        CREATE TABLE ratios (
            experiment VARCHAR, seq BIGINT, lane BIGINT, name VARCHAR, value DOUBLE, low DOUBLE, high DOUBLE, n BIGINT);
        CREATE TABLE outputs (
            experiment VARCHAR, seq BIGINT, lane BIGINT, item VARCHAR, repeat BIGINT, kind VARCHAR, text VARCHAR,
            expected VARCHAR, correct BOOLEAN, data JSON);
        CREATE TABLE kept (experiment VARCHAR, seq BIGINT, lane BIGINT, item VARCHAR, share DOUBLE[], layers VARCHAR[]);
        CREATE TABLE messages (experiment VARCHAR, seq BIGINT, t DOUBLE, level VARCHAR, lane BIGINT, text VARCHAR);
        CREATE TABLE ingested (experiment VARCHAR, last_seq BIGINT, bytes BIGINT, skipped BIGINT);
        CREATE TABLE tags (experiment VARCHAR, tag VARCHAR, t DOUBLE, author VARCHAR);
        CREATE TABLE notes (experiment VARCHAR, lane BIGINT, text VARCHAR, t DOUBLE, author VARCHAR);
        CREATE TABLE deletions (experiment VARCHAR, t DOUBLE, author VARCHAR);
        CREATE TABLE imports (id VARCHAR, experiment VARCHAR, source VARCHAR, digest VARCHAR, t DOUBLE, author VARCHAR);
        CREATE TABLE verdicts (
            experiment VARCHAR, claim VARCHAR, verdict VARCHAR, text VARCHAR, numbers JSON, t DOUBLE, author VARCHAR);
        """
    )


MIGRATIONS: tuple[Migration, ...] = (m001_record,)


def version(con: duckdb.DuckDBPyConnection) -> int:
    """How many steps this database has taken; 0 for an empty one."""
    known = con.execute("SELECT count(*) FROM duckdb_tables() WHERE table_name = 'migrations' AND NOT internal").fetchone()
    if not known or not known[0]:
        return 0
    row = con.execute("SELECT coalesce(max(version), 0) FROM migrations").fetchone()
    return int(row[0]) if row else 0


def check_version(con: duckdb.DuckDBPyConnection, where: str, steps: Sequence[Migration] = MIGRATIONS) -> int:
    """The version of a database, if this program can use it.

    Raises:
        StoreError: it was written by a newer version of the program.
    """
    found = version(con)
    if found > len(steps):
        raise StoreError(
            f"the database {where} is from a newer Pareto Studio (record version {found}, this program knows {len(steps)}); "
            "update Pareto Studio, or choose another folder with --data-dir"
        )
    return found


def migrate(con: duckdb.DuckDBPyConnection, where: str = "", steps: Sequence[Migration] = MIGRATIONS) -> int:
    """Take the steps that are missing, each in its own transaction; returns how many.

    Raises:
        StoreError: the database is from a newer version of the program.
    """
    done = check_version(con, where, steps)
    con.execute("CREATE TABLE IF NOT EXISTS migrations (version BIGINT, name VARCHAR, applied TIMESTAMP)")
    for number, step in enumerate(steps[done:], done + 1):
        con.execute("BEGIN")
        try:
            step(con)
            con.execute("INSERT INTO migrations VALUES (?, ?, now()::TIMESTAMP)", [number, step.__name__])
            con.execute("COMMIT")
        except duckdb.Error:
            con.execute("ROLLBACK")
            raise
    return len(steps) - done
