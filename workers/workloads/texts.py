"""Texts that workloads cut from: the packaged novel and the user's own files.

The novel is *Pride and Prejudice* (public domain, see ``assets/workloads/README.md``): one paragraph a
line, a blank line between paragraphs, chapter headings as paragraphs ``Chapter N``.
"""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from studio_state.catalog import asset
from studio_state.errors import WorkloadError

MAX_FILE_BYTES = 64 * 2**20
HEADING = re.compile(r"Chapter \d+")
BINARY = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f\ud800-\udfff]")  # controls but tab, breaks and ESC; halves of characters
SENTENCE_END = re.compile(r"""[.!?]["')]*(?=\s+["'(]*[A-Z])""")
NO_SENTENCE_END = re.compile(r"\b(?:Mr|Mrs|Dr|St|Esq|Messrs|[A-HJ-Z])\.$")  # "I." does end one


@dataclass(frozen=True)
class Sentence:
    """One sentence of the novel.

    Attributes:
        index: position among all sentences.
        text: without white space around it.
        chapter: number of the chapter, from 1.
        paragraph: position of its paragraph among all paragraphs.
    """

    index: int
    text: str
    chapter: int
    paragraph: int


@cache
def novel() -> str:
    """The packaged novel, chapter headings included."""
    return gzip.decompress(asset("workloads/pride-and-prejudice.txt.gz").read_bytes()).decode("utf-8")


@cache
def novel_sentences() -> tuple[Sentence, ...]:
    """All sentences of the novel in order, without chapter headings."""
    found: list[Sentence] = []
    chapter = 0
    for number, paragraph in enumerate(novel().strip().split("\n\n")):
        if HEADING.fullmatch(paragraph):
            chapter += 1
            continue
        found += [Sentence(len(found) + i, text, chapter, number) for i, text in enumerate(split_sentences(paragraph))]
    return tuple(found)


def split_sentences(paragraph: str) -> list[str]:
    """Cut where ``.``, ``!`` or ``?`` (with closing quotes) is followed by a capital; titles and initials do not cut."""
    pieces, start = [], 0
    for match in SENTENCE_END.finditer(paragraph):
        if NO_SENTENCE_END.search(paragraph, start, match.end()):
            continue
        pieces.append(paragraph[start : match.end()].strip())
        start = match.end()
    pieces.append(paragraph[start:].strip())
    return [p for p in pieces if p]


def passage(first: int, last: int) -> str:
    """The sentences ``first`` to ``last`` (exclusive) of the novel: a space between sentences, a blank line between paragraphs."""
    out, paragraph = "", -1
    for sentence in novel_sentences()[first:last]:
        glue = "" if not out else " " if sentence.paragraph == paragraph else "\n\n"
        out, paragraph = out + glue + sentence.text, sentence.paragraph
    return out


def read_text_file(given: str) -> str:
    """The user's file as text (UTF-8, a byte order mark is dropped).

    Raises:
        WorkloadError: missing, a folder, unreadable, larger than ``MAX_FILE_BYTES``, binary, not UTF-8, or blank.
    """
    try:
        path = Path(given).expanduser()
        if not path.exists():
            raise WorkloadError(f"there is no file {given!r}; give the path of a UTF-8 text file on this machine")
        if not path.is_file():
            raise WorkloadError(f"{given!r} is not a file; give the path of a UTF-8 text file")
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise WorkloadError(f"file {given!r} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read: give a part of it")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise WorkloadError(f"file {given!r} cannot be read ({error.strerror}); check its name and permissions") from error
    except UnicodeDecodeError as error:
        raise WorkloadError(
            f"file {given!r} is not UTF-8 text (byte {error.start} cannot be read); save it as UTF-8 text"
        ) from error
    except (ValueError, RuntimeError) as error:  # "~" of an unknown user
        raise WorkloadError(f"{given!r} is not a path ({error}); give the path of a UTF-8 text file") from error
    refuse_binary(text, f"file {given!r}")
    if not text.strip():
        raise WorkloadError(f"file {given!r} is empty; give a file with text in it")
    return text


def refuse_binary(text: str, what: str) -> None:
    """Binary data often decodes as UTF-8; its control characters give it away.

    Args:
        what: begins the sentence: ``the prompt``.

    Raises:
        WorkloadError: the text holds a control character that no text has, or a lone surrogate, which no tokenizer takes.
    """
    if match := BINARY.search(text):
        raise WorkloadError(
            f"{what} is binary, not text (character {match.group()!r} at position {match.start()}); give plain UTF-8 text"
        )
