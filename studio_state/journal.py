"""The journal: what a person does after the runs. Append-only, shared by the studio and the CLI.

One JSON object a line in ``journal.jsonl``. Like a spool it is the truth: the tables of tags, notes,
deletions, imports and verdicts are its fold, :func:`replay`. Nothing is ever removed, so everything can
be undone by a later entry.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from studio_state.errors import StoreError
from studio_state.paths import cannot

_LOCK_WAIT_S = 10.0


class Entry(BaseModel):
    """Base: its own id, unix time in seconds, who did it, and which experiment it is about."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    id: str = Field(default_factory=lambda: secrets.token_hex(8))
    t: float = Field(default_factory=time.time)
    by: str = ""
    experiment: str


class Tag(Entry):
    """Put a tag on an experiment."""

    kind: Literal["tag"] = "tag"
    tag: str = Field(min_length=1, max_length=100)


class Untag(Entry):
    """Take a tag off."""

    kind: Literal["untag"] = "untag"
    tag: str


class WriteNote(Entry):
    """Set the note of an experiment, or of one of its lanes; an empty text removes it."""

    kind: Literal["note"] = "note"
    text: str = Field(max_length=100_000)
    lane: int | None = None


class Delete(Entry):
    """Hide an experiment. Its spool stays."""

    kind: Literal["delete"] = "delete"


class Undelete(Entry):
    """Take a deletion back."""

    kind: Literal["undelete"] = "undelete"


class Import(Entry):
    """An experiment was brought in from a file. ``digest`` is the sha256 of what was read."""

    kind: Literal["import"] = "import"
    source: str
    digest: str = ""


class GiveVerdict(Entry):
    """How a claim came out on an experiment, with the numbers. The latest verdict per claim and experiment holds."""

    kind: Literal["verdict"] = "verdict"
    claim: str
    verdict: Literal["reproduced", "direction only", "not shown", "cannot be shown on this hardware"]
    text: str = ""
    numbers: dict[str, Any] = Field(default_factory=dict)


AnyEntry = Annotated[Tag | Untag | WriteNote | Delete | Undelete | Import | GiveVerdict, Field(discriminator="kind")]
_adapter: TypeAdapter[Any] = TypeAdapter(AnyEntry)


def append_entries(path: Path, entries: Iterable[Entry]) -> None:
    """Add entries at the end, under a file lock, and make them durable.

    Raises:
        StoreError: the journal cannot be written, or stays locked.
    """
    data = "".join(e.model_dump_json() + "\n" for e in entries).encode()
    try:
        with FileLock(path.with_suffix(".lock"), timeout=_LOCK_WAIT_S), open(path, "ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                data = data if file.read(1) == b"\n" else b"\n" + data  # end a torn line
            view = memoryview(data)
            try:
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except Timeout as e:
        raise StoreError(f"the journal {path} stays locked by another process; close it and try again") from e
    except OSError as e:
        raise cannot(f"write the journal {path}", e) from e


@dataclass
class JournalRead:
    """What :func:`read_journal` found: entries, byte to go on from, and complete lines it could not read."""

    entries: list[Entry] = field(default_factory=list)
    offset: int = 0
    skipped: int = 0


def read_journal(path: Path, offset: int = 0) -> JournalRead:
    """Entries from a byte on. Passes over lines it cannot read; ignores a last line without newline."""
    found = JournalRead(offset=offset)
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            lines = file.readlines()
    except FileNotFoundError:
        return found
    except OSError as e:
        raise cannot(f"read the journal {path}", e) from e
    for line in lines:
        if not line.endswith(b"\n"):
            break
        found.offset += len(line)
        try:
            found.entries.append(_adapter.validate_python(json.loads(line)))
        except (ValueError, ValidationError):
            found.skipped += bool(line.strip())
    return found


@dataclass
class JournalState:
    """The fold of a journal: what holds now.

    Attributes:
        tags: (experiment, tag) -> the entry that set it.
        notes: (experiment, lane or None) -> the entry.
        deletions: experiment -> the entry.
        imports: entry id -> the entry.
        verdicts: (experiment, claim) -> the entry.
    """

    tags: dict[tuple[str, str], Tag] = field(default_factory=dict)
    notes: dict[tuple[str, int | None], WriteNote] = field(default_factory=dict)
    deletions: dict[str, Delete] = field(default_factory=dict)
    imports: dict[str, Import] = field(default_factory=dict)
    verdicts: dict[tuple[str, str], GiveVerdict] = field(default_factory=dict)


def replay(entries: Iterable[Entry], state: JournalState | None = None) -> JournalState:
    """Apply entries in order to a state (a new one if None is given); returns it."""
    state = state or JournalState()
    for e in entries:
        match e:
            case Tag():
                state.tags.setdefault((e.experiment, e.tag), e)
            case Untag():
                state.tags.pop((e.experiment, e.tag), None)
            case WriteNote(text=""):
                state.notes.pop((e.experiment, e.lane), None)
            case WriteNote():
                state.notes[e.experiment, e.lane] = e
            case Delete():
                state.deletions.setdefault(e.experiment, e)
            case Undelete():
                state.deletions.pop(e.experiment, None)
            case Import():
                state.imports[e.id] = e
            case GiveVerdict():
                state.verdicts[e.experiment, e.claim] = e
    return state
