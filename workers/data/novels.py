"""Jane Austen's six novels: text to train small language models on, and a part that they never see.

The novels are read from the data of the R package *janeaustenr* (Julia Silge), which needs no R. The
held-out part, the last 60,000 characters of *Persuasion*, ships with the studio.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from studio_state.catalog import asset
from studio_state.errors import WorkloadError
from workers.data.r_data import read_database

FOLDER = "/usr/lib/R/site-library/janeaustenr/data"
NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
HELD_OUT_NOVEL, HELD_OUT_CHARACTERS = "persuasion", 60_000
HELD_OUT_FILE = "workloads/persuasion-end.txt.gz"
HEADING = re.compile(r"chapter (?:\d+|[ivxl]+)", re.I)
END = re.compile(r"finis|the end|a note on the text", re.I)
EDITION = re.compile(r"[* ]+|volume [ivx]+|[\[(].*\bvolume\b.*[\])]", re.I)  # asterisks, parts, remarks of the printers


@cache
def held_out() -> str:
    """The last 60,000 characters of *Persuasion*: no recipe trains on them."""
    return gzip.decompress(asset(HELD_OUT_FILE).read_bytes()).decode("utf-8")


def training_chapters(folder: Path) -> list[str]:
    """All chapters of the six novels without the held-out part: the one that is cut ends where that begins.

    Args:
        folder: with ``Rdata.rdb`` and ``Rdata.rdx`` of the package.

    Raises:
        WorkloadError: the files are not there, are damaged, or hold other novels.
    """
    found: list[str] = []
    for name, lines in novel_lines(folder).items():
        novel = novel_text(lines)
        if name == HELD_OUT_NOVEL:
            if not novel.endswith(held_out()):
                raise WorkloadError(
                    f"{name} in {folder} does not end with the {HELD_OUT_CHARACTERS:,} characters that the studio holds out; "
                    "take the package janeaustenr 1.0.0"
                )
            novel = novel[:-HELD_OUT_CHARACTERS]
        found += split_chapters(novel)
    return found


def novel_lines(folder: Path) -> dict[str, list[str]]:
    """The lines of each novel, as the package has them.

    Raises:
        WorkloadError: see :func:`training_chapters`.
    """
    for path in (folder / "Rdata.rdb", folder / "Rdata.rdx"):
        if not path.is_file():
            raise WorkloadError(
                f"{path} is not there; give the data folder of the R package janeaustenr "
                f"(Debian: apt install r-cran-janeaustenr puts it into {FOLDER})"
            )
    found = read_database(folder / "Rdata", NOVELS)
    for name, lines in found.items():
        if not (isinstance(lines, list) and lines and all(isinstance(line, str) for line in lines)):
            raise WorkloadError(f"{name} in {folder} is no text; take the package janeaustenr 1.0.0")
    return found


def novel_text(lines: Sequence[str]) -> str:
    """Chapter headings and paragraphs, one a line, a blank line between two.

    What belongs to the edition is left out: what stands before the first chapter and behind the last, rows of asterisks,
    names of volumes, underscores that mark emphasis, line breaks and double spaces inside a paragraph.

    Raises:
        WorkloadError: it has no chapters.
    """
    paragraphs = [" ".join(p.replace("_", "").split()) for p in re.split(r"\n\s*\n", "\n".join(lines))]
    first = next((i for i, p in enumerate(paragraphs) if HEADING.fullmatch(p)), None)
    if first is None:
        raise WorkloadError("this novel has no line such as 'Chapter 1'; take the package janeaustenr 1.0.0")
    last = next((i for i, p in enumerate(paragraphs) if i > first and END.fullmatch(p)), len(paragraphs))
    return "\n\n".join(p for p in paragraphs[first:last] if p and not EDITION.fullmatch(p))


def split_chapters(novel: str) -> list[str]:
    """Each chapter with its heading."""
    found: list[list[str]] = []
    for paragraph in novel.split("\n\n"):
        if HEADING.fullmatch(paragraph):
            found.append([])
        found[-1].append(paragraph)
    return ["\n\n".join(chapter) for chapter in found]
