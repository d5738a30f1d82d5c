"""The spool: one file per experiment, one event per line. It is the truth; the database is an index of it.

A line is complete when its newline is there. A writer that dies in the middle of a line leaves a
torn last line; readers ignore it, and the next writer ends it with a newline, so that it can never
swallow the event after it. While a writer is open it holds ``<experiment>.lock`` beside the spool;
the operating system drops that lock when the process dies, which is how an interrupted experiment is
told from a running one.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from studio_state.errors import StoreError
from studio_state.events import TERMINAL, Event, decode
from studio_state.paths import cannot

_LOCK_WAIT_S = 1.0


def new_experiment_id() -> str:
    """A fresh id: sorts by time, is safe in URLs and file names, for example ``20260131-094500-ab12cd`` (UTC)."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


class SpoolReader:
    """Iterator over the events of a spool. Never raises because of what the file holds.

    Attributes:
        skipped: complete lines passed over because they are not the next event of this experiment.
        torn: True if the last line had no newline yet (it is not yielded).
        offset: bytes up to the end of the last complete line read; give it back to go on from there.
        last: seq of the last event seen.

    Args:
        path: the spool; a missing file has no events.
        since: first seq to yield.
        offset: byte to start from, as an earlier reader left it; ``since`` must then be its ``last + 1``.
    """

    def __init__(self, path: Path, since: int = 0, offset: int = 0):
        self.path, self.since, self.offset = Path(path), since, offset
        self.skipped, self.torn, self.last = 0, False, since - 1 if offset else -1

    def __iter__(self) -> Iterator[Event]:
        experiment = self.path.stem
        for line in self._lines():
            try:
                event = decode(line)
            except ValueError:  # torn, foreign or binary
                self.skipped += bool(line.strip())
                continue
            if event.seq <= self.last or event.experiment != experiment:
                self.skipped += 1
                continue
            self.last = event.seq
            if event.seq >= self.since:
                yield event

    def _lines(self) -> Iterator[bytes]:
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        self.torn = True
                        return
                    self.offset += len(line)
                    yield line
        except FileNotFoundError:
            return
        except OSError as e:
            raise cannot(f"read the record {self.path}", e) from e


def read_spool(path: Path, since: int = 0, offset: int = 0) -> SpoolReader:
    """The events of a spool with ``seq >= since``; see :class:`SpoolReader` for what was passed over."""
    return SpoolReader(path, since, offset)


class SpoolWriter:
    """Appends events to the spool of one experiment and numbers them.

    Keep it open from submission to the terminal event: while it is open the experiment counts as
    alive. It may be used from several threads. A spool that exists is continued after its last good line.

    Args:
        path: ``DataDir.spool(experiment)``; the file's stem is the experiment id.

    Raises:
        StoreError: it cannot be written, or another process is writing it.
    """

    def __init__(self, path: Path):
        self.path, self.experiment = Path(path), Path(path).stem
        self._guard, self._fd, self._ended = threading.Lock(), -1, False
        self._lock = FileLock(lock_path(self.path), thread_local=False)
        try:
            self._lock.acquire(timeout=_LOCK_WAIT_S)
        except Timeout as e:
            raise StoreError(f"experiment {self.experiment} is being recorded by another process; wait until it has ended") from e
        except OSError as e:
            raise cannot(f"write the record {self.path}", e) from e
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
            self.next_seq = self._resume()
        except OSError as e:
            self.close()
            raise cannot(f"write the record {self.path}", e) from e
        except StoreError:
            self.close()
            raise

    def _resume(self) -> int:
        """Seq of the next event; ends a torn last line."""
        reader = read_spool(self.path)
        for event in reader:
            self._ended = event.event in TERMINAL  # type: ignore[attr-defined]
        if reader.torn:
            self._write(b"\n")
        return reader.last + 1

    def append(self, event: Event) -> Event:
        """Write one event; returns it with its ``experiment`` and ``seq``.

        Raises:
            StoreError: full disk and the like; the file then ends as before.
            ValueError: the event belongs to another experiment.
        """
        return self.append_all([event])[0]

    def append_all(self, events: Iterable[Event]) -> list[Event]:
        """Write several events in one go (all or none); returns them with ``experiment`` and ``seq``.

        Raises:
            StoreError: full disk and the like; the file then ends as before.
            ValueError: an event belongs to another experiment.
        """
        with self._guard:
            if self._fd < 0:
                raise StoreError(f"the record of experiment {self.experiment} is closed; nothing can be added to it")
            numbered = []
            for seq, event in enumerate(events, self.next_seq):
                if event.experiment not in ("", self.experiment):
                    raise ValueError(f"event of experiment {event.experiment} in the spool of {self.experiment}")
                numbered.append(event.model_copy(update={"experiment": self.experiment, "seq": seq}))
            ends = any(e.event in TERMINAL for e in numbered)  # type: ignore[attr-defined]
            try:
                self._write("".join(e.line() + "\n" for e in numbered).encode())
                if ends:
                    os.fsync(self._fd)
            except OSError as e:
                raise cannot(f"write the record {self.path}", e) from e
            self.next_seq += len(numbered)
            self._ended = self._ended or ends
            return numbered

    def _write(self, data: bytes) -> None:
        """Write everything, or cut the file back to where it ended."""
        end, view = os.fstat(self._fd).st_size, memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            if os.fstat(self._fd).st_size > end:
                os.ftruncate(self._fd, end)
            raise

    @property
    def ended(self) -> bool:
        """True if a terminal event has been written."""
        return self._ended

    def close(self) -> None:
        """Close the file and let the experiment go."""
        with self._guard:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            self._lock.release()
            if self._ended:
                lock_path(self.path).unlink(missing_ok=True)

    def __enter__(self) -> SpoolWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def lock_path(spool: Path) -> Path:
    """The lock file that a writer of this spool holds."""
    return spool.with_suffix(".lock")


def is_alive(spool: Path) -> bool:
    """True if a living process (this one included) has the spool open for writing."""
    path = lock_path(spool)
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:  # a read-only data directory: nobody can be writing
        return False
    lock.release()
    return False
