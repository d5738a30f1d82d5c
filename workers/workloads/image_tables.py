"""Images of one's own: a folder of them, one file, or a table (CSV, TSV, JSONL) that names them.

Everything that cannot be used is found here, when the items are made: a race of an hour must not end
at its last image. Images are looked at (their headers), not unpacked; they are opened when their turn comes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from studio_state.errors import WorkloadError
from studio_state.problems import nearest
from workers.data.pictures import SUFFIXES, check_image
from workers.workloads.tables import read_rows, require_columns

T = TypeVar("T")

TABLES = (".csv", ".tsv", ".jsonl")
MOST_FILES = 200_000  # a folder with more is not what somebody meant to give


@dataclass(frozen=True)
class Listed:
    """An image that was given.

    Attributes:
        id: stable name: the path inside the folder, or the line of the table.
        path: the file.
        source: where it was named, to begin a sentence with; empty for a file of a folder.
        cells: the other columns of its row.
    """

    id: str
    path: Path
    source: str = ""
    cells: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Look at the file.

        Raises:
            WorkloadError: it is not there, or not an image; the sentence says which row names it.
        """
        try:
            check_image(self.path)
        except WorkloadError as error:
            raise WorkloadError(f"{self.source}: {error}" if self.source else str(error)) from error


def given_images(given: str, words: Sequence[str], required: Sequence[str], optional: Sequence[str]) -> list[Listed]:
    """The images that a source names: all of a folder, one file, or the rows of a table. None is looked at yet.

    Args:
        given: what the person wrote; a path.
        words: what could have been given instead of a path, for the sentence.
        required, optional: columns of a table beside ``image``.

    Raises:
        WorkloadError: there is no such path, no image in the folder, or the table cannot be used.
    """
    path = _existing(given, words)
    if path.is_dir():
        return folder_images(given, path)
    if path.suffix.lower() in SUFFIXES:
        return [Listed(path.name, path)]
    if path.suffix.lower() not in TABLES:
        raise WorkloadError(
            f"{given!r} is neither a folder nor an image ({', '.join(SUFFIXES)}) nor a table of images ({', '.join(TABLES)}); "
            "give one of these"
        )
    return table_images(given, path, required, optional)


def _existing(given: str, words: Sequence[str]) -> Path:
    allowed = f"{', '.join(map(repr, words))}, a folder of images, an image, or a table of images ({', '.join(TABLES)})"
    if not given.strip():
        raise WorkloadError(f"the source is empty; give {allowed}")
    try:
        path = Path(given).expanduser()
        there = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long; a zero character; "~" of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise WorkloadError(f"{given!r} is not a path ({reason}); give {allowed}") from error
    if not there:
        raise WorkloadError(f"there is no file or folder {given!r}; {nearest(given, list(words))}give {allowed}")
    return path


def folder_images(given: str, folder: Path) -> list[Listed]:
    """All images in a folder and its subfolders, by name; hidden files and folders are left out.

    Raises:
        WorkloadError: there is none, the folder cannot be read, or it holds far too many files.
    """

    def refuse(error: OSError) -> None:
        raise WorkloadError(f"folder {error.filename!r} cannot be read ({error.strerror}); check its permissions") from error

    found: list[Path] = []
    files = 0
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [f for f in folders if not f.startswith((".", "__"))]
        files += len(names)
        if files > MOST_FILES:
            raise WorkloadError(f"folder {given!r} holds more than {MOST_FILES:,} files; give a smaller one")
        found += [Path(place, n) for n in names if not n.startswith(".") and Path(n).suffix.lower() in SUFFIXES]
    if not found:
        raise WorkloadError(f"folder {given!r} holds no images; give one with {', '.join(SUFFIXES)} files in it")
    return sorted((Listed(p.relative_to(folder).as_posix(), p) for p in found), key=lambda image: image.id)


def table_images(given: str, path: Path, required: Sequence[str], optional: Sequence[str]) -> list[Listed]:
    """The rows of a table; paths in column ``image`` count from the folder that the table lies in.

    Raises:
        WorkloadError: the table cannot be read, a column is missing or misspelt, or a row names no image.
    """
    rows = read_rows(given, "image")
    require_columns(given, rows, ["image", *required])
    columns = list(dict.fromkeys(name for row in rows for name in row.cells))
    missing = [name for name in optional if name not in columns]
    for name in columns:
        if name not in ("image", *required) and (hint := nearest(name, missing)):
            raise WorkloadError(f"file {given!r} has a column {name!r} that is not read; {hint}rename or remove the column")
    images = []
    for row in rows:
        source, cells = f"line {row.line} of {given!r}", dict(row.cells)
        name = cells.pop("image", None)
        if not isinstance(name, str) or not name.strip():
            raise WorkloadError(f"{source} has no text in column 'image'; every row needs the path of an image")
        images.append(Listed(f"line-{row.line}", path.parent / name.strip(), source, cells))
    return images


def spread(items: Sequence[T], label: Callable[[T], object]) -> list[T]:
    """The items so ordered that every beginning holds all labels about equally often: one of each in turn."""
    groups: dict[object, list[T]] = {}
    for item in items:
        groups.setdefault(label(item), []).append(item)
    return [group[i] for i in range(max(map(len, groups.values()), default=0)) for group in groups.values() if i < len(group)]


def checked(images: Iterable[Listed]) -> list[Listed]:
    """The same images, each looked at.

    Raises:
        WorkloadError: one of them cannot be used.
    """
    found = list(images)
    for image in found:
        image.check()
    return found
