"""Large tables of cases: a part of them runs always, all of them with ``make test-all``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from zlib import crc32

import pytest


def sampled(cases: Iterable[Any], every: int, always: Callable[[Any], bool] = lambda case: False) -> list[Any]:
    """The cases as parameters, all but about one in ``every`` marked slow.

    Which ones these are depends on a case's own text, so that another policy does not shift the others.

    Args:
        always: cases that are never slow.
    """
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[] if always(case) or chosen(case, every) else SLOW)
        for case in cases
    ]


def chosen(case: Any, every: int) -> bool:
    """Whether it is one of those that run always."""
    return crc32(repr(case).encode()) % every == 0


SLOW = pytest.mark.slow
