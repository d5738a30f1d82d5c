"""Large tables of cases: a part of them runs always, all of them with ``make test-all``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from zlib import crc32

import pytest


def sampled(
    cases: Iterable[Any], every: int, always: Callable[[Any], bool] = lambda case: False, text: Callable[[Any], str] = repr
) -> list[Any]:
    """The cases as parameters, all but about one in ``every`` marked slow.

    Which ones these are depends on a case's own text, so that another policy does not shift the others.

    Args:
        always: cases that are never slow.
        text: a case's own text, the same in every process.
    """
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=[] if always(case) or chosen(text(case), every) else SLOW
        )
        for case in cases
    ]


def first(count: int, *cases: Any) -> list[Any]:
    """The cases as parameters, all behind the first ``count`` marked slow."""
    return [pytest.param(case, marks=[] if i < count else SLOW) for i, case in enumerate(cases)]


def chosen(text: str, every: int) -> bool:
    """Whether it is one of those that run always."""
    return crc32(text.encode()) % every == 0


SLOW = pytest.mark.slow
