"""The studio's database: an index of spools and journal, kept by one writer thread.

Nothing enters it but through the spools and the journal: :meth:`Store.append` says which spools have
grown, and the writer thread reads them in batches. So a rebuild gives the same tables, and losing the file
loses nothing. DuckDB lets one process open a file; the lock file ``studio.lock`` makes a second studio on
the same data directory stop with a sentence.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import duckdb
from filelock import FileLock, Timeout

from studio_state import database
from studio_state.database import Damaged
from studio_state.errors import StoreError
from studio_state.events import Event
from studio_state.history import History
from studio_state.ingest import Ingester
from studio_state.journal import Entry, append_entries
from studio_state.paths import DataDir, cannot

BATCH_S = 0.25
_Job = tuple[str, Any]


class Store(History):
    """The only opener of ``studio.duckdb``. For reading see :class:`studio_state.history.History`.

    Spools that were written while no store was open are caught up in the background.

    Args:
        data: an opened data directory.

    Attributes:
        notes: sentences worth showing, for example that the database was damaged and is rebuilt.

    Raises:
        StoreError: another studio uses the directory, the database is from a newer version, or it cannot be written.
    """

    def __init__(self, data: DataDir):
        self._lock = FileLock(data.lock("studio"), thread_local=False)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as e:
            raise StoreError(
                f"another Pareto Studio uses the data directory {data.root}; use that one, close it, or choose another folder with --data-dir"
            ) from e
        except OSError as e:
            raise cannot(f"use the data directory {data.root}", e) from e
        notes: list[str] = []
        try:
            super().__init__(data, _open(data, notes), notes)
            self._ingester = self._reader()
        except (StoreError, duckdb.Error) as e:
            self._lock.release()
            raise e if isinstance(e, StoreError) else database.cannot_read(e) from e
        self._problem: StoreError | None = None
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a program that ends without closing still stores what it was told
        self.refresh()
        if notes:
            self.flush()

    # -- what others say

    def append(self, events: Iterable[Event]) -> None:
        """Say that these events are in their spools (``SpoolWriter.append`` returned them). Returns at once.

        Raises:
            ValueError: an event has no number, so it is in no spool.
        """
        grown: dict[str, None] = {}
        for event in events:
            if event.seq < 0 or not event.experiment:
                raise ValueError(f"write the event to its spool first: {event.line()[:200]}")
            grown[event.experiment] = None
        for experiment in grown:
            self.ingest(self.data.spool(experiment))

    def ingest(self, path: Path) -> None:
        """Say that a spool may have new lines. Idempotent by (experiment, seq). Returns at once."""
        self._jobs.put(("spool", path))

    def refresh(self) -> None:
        """Look for spools and journal entries of other processes (the CLI). Returns at once."""
        self._jobs.put(("scan", None))

    def record(self, *entries: Entry) -> None:
        """Write what a person did into the journal; readers see it when this returns.

        Raises:
            StoreError: the journal or the database cannot be written.
        """
        append_entries(self.data.journal, entries)
        self._call(lambda: self._ingester.journal(self.data.journal))

    def flush(self) -> None:
        """Wait until everything said so far can be read.

        Raises:
            StoreError: the database cannot be written.
        """
        self._call(lambda: None)
        if self._problem:
            raise self._problem

    def rebuild(self) -> None:
        """Make the database anew from spools and journal and swap it in. Readers see the old one, then the new one.

        Raises:
            StoreError: the new one cannot be written; the old one stays.
        """
        self._call(self._rebuild)

    def close(self) -> None:
        """Store what is left and let the database go. A second call does nothing."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self._jobs.put(("stop", None))
            self._thread.join()
        self._ingester.con.close()
        super().close()
        self._lock.release()

    # -- the writer thread

    def _call(self, job: Callable[[], None]) -> None:
        """Run something in the writer thread after all that was said before; wait for it."""
        if not self._thread.is_alive():
            raise StoreError("the record is closed; open it again")
        done: Future[None] = Future()
        self._jobs.put(("call", (job, done)))
        done.result()

    def _work(self) -> None:
        stop = False
        while not stop:
            grown, calls, scan, stop = self._collect()
            try:
                if scan:
                    self._ingester.journal(self.data.journal)
                    grown |= dict.fromkeys(self._ingester.behind(self.data.spools))
                elif self._problem:  # what failed before is tried again
                    grown |= dict.fromkeys(self._ingester.behind(self.data.spools))
                self._ingester.spools(list(grown))
                self._problem = None
                self.notes += [n for n in self._ingester.refused.values() if n not in self.notes]
            except Exception as e:  # the thread must outlive a full disk; flush() and the next page say why
                self._problem = e if isinstance(e, StoreError) else database.cannot_write(e)
                self._recover()
            for job, done in calls:
                try:
                    done.set_result(job())
                except StoreError as e:
                    done.set_exception(e)
                except Exception as e:
                    done.set_exception(database.cannot_write(e))

    def _collect(self) -> tuple[dict[Path, None], list[tuple[Callable[[], None], Future[None]]], bool, bool]:
        """Jobs of the next quarter of a second; at once where somebody waits."""
        grown: dict[Path, None] = {}
        calls: list[tuple[Callable[[], None], Future[None]]] = []
        scan = stop = False
        until: float | None = None
        while not (calls or stop):
            try:
                kind, what = self._jobs.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            until = until or time.monotonic() + (0.0 if kind == "scan" else BATCH_S)
            match kind:
                case "spool":
                    grown[what] = None
                case "scan":
                    scan = True
                case "call":
                    calls.append(what)
                case "stop":
                    stop = True
        return grown, calls, scan, stop

    def _recover(self) -> None:
        """After a failed batch: a usable connection, and what the database really holds."""
        try:
            self._ingester.reload()
        except duckdb.Error:
            with self._gate.alone():
                try:
                    self._reopen()
                except (StoreError, Damaged, duckdb.Error) as e:
                    self._problem = e if isinstance(e, StoreError) else database.cannot_write(e)

    def _reader(self) -> Ingester:
        if self._con is None:
            raise StoreError("the record is closed; open it again")
        return Ingester(self._con.cursor())

    def _reopen(self, swap: Callable[[], object] = lambda: None) -> None:
        """Close the file, do ``swap``, open it again; only while nobody reads."""
        self._ingester.con.close()
        if self._con is not None:
            self._con.close()
            self._con = None
        swap()
        self._con = database.open_current(self.data.database)
        self._ingester = self._reader()

    def _rebuild(self) -> None:
        target = self.data.database
        fresh = target.with_name(target.name + ".new")
        try:
            _build(fresh, self.data)
        except (duckdb.Error, Damaged, OSError, StoreError) as e:
            _remove(fresh)
            raise e if isinstance(e, StoreError) else database.cannot_write(e) from e

        def swap() -> None:
            database.wal(target).unlink(missing_ok=True)
            fresh.replace(target)

        with self._gate.alone():
            self._reopen(swap)
        self._ingester.journal(self.data.journal)
        self._ingester.spools(self._ingester.behind(self.data.spools))


def _open(data: DataDir, notes: list[str]) -> duckdb.DuckDBPyConnection:
    """Open the database; a damaged one is kept under another name and an empty one takes its place."""
    try:
        return database.open_current(data.database)
    except Damaged as e:
        try:
            kept = database.move_aside(data.database)
        except OSError as error:
            raise cannot(f"move the damaged database {data.database} aside", error) from error
        notes.append(f"the database was damaged ({e}); it is kept as {kept.name}, and a new one was built from the spools")
    try:
        return database.open_current(data.database)
    except Damaged as e:
        raise StoreError(f"cannot make the database {data.database}: {e}; choose another folder with --data-dir") from e


def _build(path: Path, data: DataDir) -> None:
    """A complete database in a new file, closed."""
    _remove(path)
    with database.open_current(path) as con:
        ingester = Ingester(con)
        ingester.spools(ingester.behind(data.spools))
        ingester.journal(data.journal)
        con.execute("CHECKPOINT")


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    database.wal(path).unlink(missing_ok=True)
