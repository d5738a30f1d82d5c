"""The journal: what a person did, its fold, undo, and two programs writing at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from studio_state.errors import StoreError
from studio_state.journal import (
    Delete,
    GiveVerdict,
    Import,
    Tag,
    Undelete,
    Untag,
    WriteNote,
    append_entries,
    read_journal,
    replay,
)


def test_fold_and_undo() -> None:
    entries = [
        Tag(experiment="e1", tag="good"), Tag(experiment="e1", tag="old"), Untag(experiment="e1", tag="old"), Untag(experiment="e2", tag="none"),
        WriteNote(experiment="e1", text="first"), WriteNote(experiment="e1", text="second"), WriteNote(experiment="e1", lane=1, text="lane"),
        WriteNote(experiment="e2", text="gone"), WriteNote(experiment="e2", text=""),
        Delete(experiment="e1"), Undelete(experiment="e1"), Delete(experiment="e2"),
        Import(experiment="e3", source="friend.jsonl", digest="ab"),
        GiveVerdict(experiment="e1", claim="c", verdict="not shown"), GiveVerdict(experiment="e1", claim="c", verdict="reproduced"),
    ]  # fmt: skip
    state = replay(entries)
    assert set(state.tags) == {("e1", "good")}
    assert {k: e.text for k, e in state.notes.items()} == {("e1", None): "second", ("e1", 1): "lane"}
    assert set(state.deletions) == {"e2"}
    assert [e.source for e in state.imports.values()] == ["friend.jsonl"]
    assert {k: e.verdict for k, e in state.verdicts.items()} == {("e1", "c"): "reproduced"}


def test_fold_in_two_parts_equals_the_fold_of_all() -> None:
    entries = [Tag(experiment="e", tag="a"), Delete(experiment="e"), Untag(experiment="e", tag="a"), Undelete(experiment="e")]
    assert replay(entries[2:], replay(entries[:2])) == replay(entries)


def test_file_round_trip_torn_and_foreign_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert read_journal(path).entries == []
    tag = Tag(experiment="e", tag="ü")
    append_entries(path, [tag])
    with open(path, "a") as file:
        file.write('{"kind":"from_the_future","experiment":"e"}\n{"kind":"tag","exper')
    found = read_journal(path)
    assert (found.entries, found.skipped) == ([tag], 1)
    note = WriteNote(experiment="e", text="two\nlines")
    append_entries(path, [note])
    rest = read_journal(path, found.offset)
    assert (rest.entries, rest.skipped) == ([note], 1)
    assert [json.loads(x)["kind"] for x in path.read_text().splitlines() if x.endswith("}")] == ["tag", "from_the_future", "note"]


def test_two_processes_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        "import sys; from pathlib import Path; from studio_state.journal import *\n"
        "for i in range(60): append_entries(Path(sys.argv[1]), [Tag(experiment=sys.argv[2], tag=f't{i}')])"
    )
    command = [sys.executable, "-c", code, str(path)]
    children = [subprocess.Popen([*command, name], cwd=Path(__file__).parents[2]) for name in ("one", "two")]
    assert [c.wait() for c in children] == [0, 0]
    found = read_journal(path)
    assert found.skipped == 0
    for name in ("one", "two"):
        assert [e.tag for e in found.entries if e.experiment == name] == [f"t{i}" for i in range(60)]


def test_unwritable_journal_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises(StoreError, match="cannot write the journal") as error:
        append_entries(tmp_path / "journal.jsonl", [Delete(experiment="e")])
    assert "\n" not in str(error.value)
