"""Opening DuckDB, and saying in one sentence why it could not be opened."""

from __future__ import annotations

import time
from pathlib import Path

import duckdb

from studio_state.errors import StoreError
from studio_state.migrations import check_version, migrate

MEMORY = ":memory:"
_CONFIG = {
    "autoinstall_known_extensions": "false",  # nothing is ever fetched
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",
    "memory_limit": "1GB",
}


class Damaged(Exception):
    """The file is not a readable DuckDB database."""


def connect(path: Path | str, read_only: bool = False) -> duckdb.DuckDBPyConnection:
    """Open a database file or ``:memory:``.

    Raises:
        StoreError: another process holds it, it is from a newer version, or the folder cannot be used.
        Damaged: its content cannot be read.
    """
    if isinstance(path, Path) and path.is_dir():
        raise StoreError(f"the database {path} is a folder; move it away, the database is rebuilt from the spools")
    try:
        return duckdb.connect(str(path), read_only=read_only, config=dict(_CONFIG))
    except duckdb.Error as e:
        raise explain(e, path) from e


def explain(error: duckdb.Error, path: Path | str) -> StoreError | Damaged:
    """What to raise for an error of DuckDB on opening."""
    text = str(error)
    if "Could not set lock" in text or "used by another process" in text:
        return StoreError(f"the database {path} is in use by another program; close it, or choose another folder with --data-dir")
    if "newer version" in text or "version number" in text:
        return StoreError(
            f"the database {path} is from a newer DuckDB; update Pareto Studio, or choose another folder with --data-dir"
        )
    if "No space left" in text or "Read-only file system" in text or "Permission denied" in text:
        return StoreError(
            f"cannot open the database {path}: {_first_line(text)}; free the disk, or choose another folder with --data-dir"
        )
    return Damaged(_first_line(text))


def cannot_read(error: duckdb.Error) -> StoreError:
    """The sentence for a query that failed although the database was opened."""
    return StoreError(
        f"the database cannot be read ({_first_line(str(error))}); close Pareto Studio and delete studio.duckdb: "
        "it is rebuilt from the spools, nothing is lost"
    )


def cannot_write(error: BaseException) -> StoreError:
    """The sentence for rows that could not be stored."""
    return StoreError(
        f"the database cannot be written ({_first_line(str(error))}); free the disk: "
        "the results are safe in their spools and are stored at the next try"
    )


def open_current(path: Path) -> duckdb.DuckDBPyConnection:
    """Open a database file with all migrations taken; a new file if there is none.

    A file from a newer version is looked at read-only and left exactly as it was.

    Raises:
        StoreError: see :func:`connect`.
        Damaged: its content cannot be read.
    """
    if path.exists():
        with connect(path, read_only=True) as con:
            try:
                _check_length(con, path)
                check_version(con, str(path))
            except duckdb.Error as e:
                raise Damaged(_first_line(str(e))) from e
    else:
        wal(path).unlink(missing_ok=True)
    con = connect(path)
    try:
        migrate(con, str(path))
    except duckdb.Error as e:
        con.close()
        raise explain(e, path) from e
    except StoreError:
        con.close()
        raise
    return con


def _check_length(con: duckdb.DuckDBPyConnection, path: Path) -> None:
    """A file that was cut off opens, and fails only when a missing block is read: say so at once."""
    row = con.execute("SELECT block_size * total_blocks FROM pragma_database_size()").fetchone()
    if row and path.stat().st_size < row[0]:
        raise Damaged(f"{path.name} is cut off after {path.stat().st_size} bytes")


def move_aside(path: Path) -> Path:
    """Keep a damaged database under another name; returns the new path."""
    kept = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1_000_000:06d}")
    path.replace(kept)
    if wal(path).exists():
        wal(path).replace(wal(kept))
    return kept


def wal(path: Path) -> Path:
    """DuckDB's write-ahead log beside a database file."""
    return path.with_name(path.name + ".wal")


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].rstrip(".") if text.strip() else "unknown error"
