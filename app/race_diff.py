"""Which tokens of a lane's output differ from the baseline's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, groupby
from typing import NamedTuple

from app.race_parts import Stream


class Diff(NamedTuple):
    """A lane's output against another's.

    Attributes:
        runs: (text, kind) in order; kind is ``same``, ``added`` (not in the other) or ``removed`` (only in the other).
        equal: tokens that stand in both.
        total: tokens of the longer of the two.
        first: tokens before the first difference; None if there is none so far.
    """

    runs: list[tuple[str, str]]
    equal: int
    total: int
    first: int | None


def flat(ids: Sequence[tuple[int, ...]]) -> list[int]:
    """Token ids of all pieces, one after the other."""
    return list(chain.from_iterable(ids))


def diff(stream: Stream, against: Stream) -> Diff:
    """Compare token by token.

    While either output still grows, position by position over the common length; once both are
    done, by the longest matching blocks, so that an inserted word does not mark all that follows.
    """
    mine, theirs = flat(stream.ids), flat(against.ids)
    common = _common_prefix(mine, theirs)
    split = common < min(len(mine), len(theirs))
    if stream.outcome is None or against.outcome is None:
        differs = [split and i >= common for i in range(len(mine))]
        return Diff(runs(stream, differs), differs.count(False), max(len(mine), len(theirs)), common if split else None)
    matcher = difflib.SequenceMatcher(None, theirs, mine, autojunk=False)
    found = _merged(_opcode_runs(stream, against, matcher.get_opcodes()))
    equal = sum(block.size for block in matcher.get_matching_blocks())
    return Diff(found, equal, max(len(mine), len(theirs)), common if split or len(mine) != len(theirs) else None)


def runs(stream: Stream, differs: Sequence[bool]) -> list[tuple[str, str]]:
    """The text in runs of ``same`` and ``added``; a piece of several tokens differs if any of them does."""
    flags, start = [], 0
    for ids in stream.ids:
        flags.append("added" if any(differs[start : start + len(ids)]) else "same")
        start += len(ids)
    return _merged(zip(stream.pieces, flags, strict=True))


def _opcode_runs(stream: Stream, against: Stream, opcodes: Iterable[tuple[str, int, int, int, int]]) -> Iterator[tuple[str, str]]:
    """Pieces of both outputs in reading order. A piece goes with its first token."""
    mine, theirs = _starts(stream), _starts(against)
    for tag, a0, a1, b0, b1 in opcodes:
        if tag != "equal":
            yield "".join(p for at, p in theirs if a0 <= at < a1), "removed"
        yield "".join(p for at, p in mine if b0 <= at < b1), "same" if tag == "equal" else "added"


def _starts(stream: Stream) -> list[tuple[int, str]]:
    """(position of the first token, text) of every piece."""
    starts = accumulate((len(ids) for ids in stream.ids), initial=0)
    return list(zip(starts, stream.pieces, strict=False))


def _merged(parts: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbours of one kind joined, empty texts left out."""
    full = (p for p in parts if p[0])
    return [("".join(text for text, _ in group), kind) for kind, group in groupby(full, key=lambda p: p[1])]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
