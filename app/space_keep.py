"""Keeps the record of a Space in a folder that outlives it, such as a mounted bucket.

A bucket is object storage behind a file interface: DuckDB's file and file locks do not belong there. So the studio works on
the local disk; whole files are copied to the bucket once their experiment has ended, and read back at the next start.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from studio_state.errors import StoreError
from studio_state.paths import DataDir
from studio_state.spool import is_alive

log = logging.getLogger(__name__)
EVERY_S = 20.0


class Keeper:
    """Reads back on entering, copies now and then, and a last time on leaving.

    Args:
        data: the data directory on the local disk, before any store opens it.
        folder: where copies are kept.
        every_s: seconds between two looks for what is new.

    Raises:
        StoreError: the folder cannot be read or written.
    """

    def __init__(self, data: DataDir, folder: Path, every_s: float = EVERY_S):
        self.data, self.folder, self._every_s = data, folder, every_s
        self._copied: dict[str, tuple[int, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="keeper", daemon=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.bring_back()
            probe = folder / f".probe-{os.getpid()}"
            probe.write_bytes(b"0")
            probe.unlink()
        except OSError as e:
            raise StoreError(
                f"cannot keep the runs in {folder}: {e.strerror or e}; mount a bucket there that may be written, or leave STUDIO_DATA out"
            ) from e

    def bring_back(self) -> int:
        """Copy what was kept into the data directory; returns the number of files."""
        found = list(recorded(self.folder))
        for name in found:
            copy(self.folder / name, self.data.root / name)
            self._copied[name] = _mark(self.data.root / name)
        return len(found)

    def sweep(self) -> int:
        """Copy what is new and no longer written; returns the number of files.

        Raises:
            OSError: the folder cannot be written.
        """
        count = 0
        for name in recorded(self.data.root):
            source = self.data.root / name
            mark = _mark(source)
            if self._copied.get(name) == mark or (source.parent == self.data.spools and is_alive(source)):
                continue
            copy(source, self.folder / name)
            self._copied[name] = mark
            count += 1
        return count

    def _work(self) -> None:
        while not self._stop.wait(self._every_s):
            self._sweep_or_say()

    def _sweep_or_say(self) -> None:
        try:
            self.sweep()
        except OSError as e:
            log.warning("the runs cannot be copied to %s now (%s); it is tried again", self.folder, e.strerror or e)

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sweep_or_say()


def recorded(root: Path) -> Iterator[str]:
    """Names, relative to a data directory, of the files that are the truth: artifacts before the spools that name them."""
    for pattern in ("artifacts/??/*", "spool/*.jsonl", "journal.jsonl"):
        yield from (str(p.relative_to(root)) for p in sorted(root.glob(pattern)) if p.is_file() and p.suffix != ".part")


def copy(source: Path, target: Path) -> None:
    """Copy a file whole: its name is there when all of it is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        shutil.copyfile(source, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _mark(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
