"""Which tokens of a lane's output differ from the baseline's."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import chain, groupby
from typing import NamedTuple

from app.race import Stream


class Diff(NamedTuple):
    """A lane's output against another's.

    Attributes:
        runs: (text, differs) in order; neighbours with the same flag are joined.
        equal, total: tokens that stand in both; tokens of this output.
        first: tokens before the first difference; None if there is none so far.
    """

    runs: list[tuple[str, bool]]
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
    else:
        differs = [True] * len(mine)
        for block in difflib.SequenceMatcher(None, theirs, mine, autojunk=False).get_matching_blocks():
            differs[block.b : block.b + block.size] = [False] * block.size
    ended = stream.outcome is not None and against.outcome is not None
    parted = split or (ended and len(mine) != len(theirs))
    return Diff(runs(stream, differs), differs.count(False), len(mine), common if parted else None)


def runs(stream: Stream, differs: Sequence[bool]) -> list[tuple[str, bool]]:
    """Join the pieces of text into runs; a piece differs if any of its tokens does."""
    flags, start = [], 0
    for ids in stream.ids:
        flags.append(any(differs[start : start + len(ids)]))
        start += len(ids)
    pairs = zip(stream.pieces, flags, strict=True)
    return [("".join(text for text, _ in group), flag) for flag, group in groupby(pairs, key=lambda p: p[1])]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
