"""Where things lie on disk: the data directory (spools, journal, database, artifacts) and the cache.

::

    <data>/spool/<experiment>.jsonl   the truth: the events of one experiment
    <data>/journal.jsonl              the truth: what a person did afterwards
    <data>/studio.duckdb              an index of both; may be deleted, it is rebuilt
    <data>/artifacts/ab/abcd...       images, masks, checkpoints by sha256
    <data>/devices/                   what calibrations measured
    <data>/locks/                     lock files of the studio and of devices
    <cache>/                          models; may be deleted, they are fetched again
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_dir, user_data_dir

from studio_state.errors import StoreError

APP = "pareto-studio"
DATA_VARIABLE = "PARETO_STUDIO_DATA"
CACHE_VARIABLE = "PARETO_STUDIO_CACHE"
_PROBE_BYTES = 4096
_SAFE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")


def default_data_root() -> Path:
    """``$PARETO_STUDIO_DATA``, else the platform's folder for user data."""
    return Path(os.environ.get(DATA_VARIABLE) or user_data_dir(APP, appauthor=False)).expanduser()


def default_cache_root() -> Path:
    """``$PARETO_STUDIO_CACHE``, else the platform's cache folder."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_dir(APP, appauthor=False)).expanduser()


@dataclass(frozen=True)
class DataDir:
    """Names of everything in one data directory. Creating it touches nothing; :meth:`open` makes the folders.

    Args:
        root: the data directory.
        cache: folder of downloaded and converted models.
    """

    root: Path
    cache: Path

    @classmethod
    def at(cls, root: str | Path | None = None, cache: str | Path | None = None) -> DataDir:
        """A data directory by its path; None = the environment variable or the platform's default."""
        chosen = Path(root).expanduser() if root else default_data_root()
        return cls(chosen.absolute(), (Path(cache).expanduser() if cache else default_cache_root()).absolute())

    @property
    def spools(self) -> Path:
        """Folder of the spools."""
        return self.root / "spool"

    @property
    def journal(self) -> Path:
        """The journal file."""
        return self.root / "journal.jsonl"

    @property
    def database(self) -> Path:
        """The DuckDB file; only :class:`studio_state.store.Store` opens it."""
        return self.root / "studio.duckdb"

    @property
    def artifacts(self) -> Path:
        """Folder of the artifacts."""
        return self.root / "artifacts"

    @property
    def locks(self) -> Path:
        """Folder of the lock files."""
        return self.root / "locks"

    def spool(self, experiment: str) -> Path:
        """The spool of one experiment.

        Raises:
            StoreError: this cannot be the id of an experiment (it could name a file elsewhere).
        """
        if not _SAFE_NAME.match(experiment):
            raise StoreError(f"{experiment!r} is not an experiment id; ids look like 20260131-094500-ab12cd (see the history)")
        return self.spools / f"{experiment}.jsonl"

    def lock(self, name: str) -> Path:
        """A lock file: ``studio``, or a device such as ``device-cpu`` (characters that files cannot have become ``-``)."""
        name = re.sub(r"[^A-Za-z0-9._-]", "-", name)
        return self.locks / f"{name}.lock"

    def artifact(self, digest: str) -> Path:
        """Path of the artifact with this sha256 (hex).

        Raises:
            StoreError: this is not a sha256.
        """
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise StoreError(f"{digest[:80]!r} is not an artifact; artifacts are named by their sha256 (64 hex digits)")
        return self.artifacts / digest[:2] / digest

    def keep_artifact(self, data: bytes) -> str:
        """Store bytes under their sha256, once; returns the digest.

        Raises:
            StoreError: it cannot be written.
        """
        digest = hashlib.sha256(data).hexdigest()
        target = self.artifact(digest)
        if not target.exists():
            part = target.with_name(f"{digest}.{os.getpid()}.part")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                part.write_bytes(data)
                part.replace(target)
            except OSError as e:
                part.unlink(missing_ok=True)
                raise cannot(f"write to {self.artifacts}", e) from e
        return digest

    def open(self) -> DataDir:
        """Create the folders and make sure that they can be written.

        Raises:
            StoreError: read-only, full, not a folder, or not permitted; one sentence.
        """
        probe = self.locks / f".probe-{os.getpid()}"
        try:
            for folder in (self.root, self.spools, self.artifacts, self.locks):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                with open(probe, "wb") as f:
                    f.write(b"\0" * _PROBE_BYTES)
            finally:
                probe.unlink(missing_ok=True)
        except OSError as e:
            raise cannot(f"use the data directory {self.root}", e) from e
        return self


def cannot(what: str, error: OSError) -> StoreError:
    """One sentence for a failed file operation.

    Args:
        what: what was tried: ``use the data directory /data``.
        error: why it failed.
    """
    reason = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file may not grow any further (file size limit)",
        errno.EROFS: "it is read-only",
        errno.EACCES: "it may not be written by this user",
        errno.EPERM: "it may not be written by this user",
        errno.ENOTDIR: f"{error.filename or 'a part of the path'} is a file, not a folder",
        errno.EEXIST: f"{error.filename or 'it'} is a file, not a folder",
    }.get(error.errno or 0, error.strerror or str(error))
    return StoreError(f"cannot {what}: {reason}; free it, or choose another folder with --data-dir or {DATA_VARIABLE}")
