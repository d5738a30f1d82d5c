"""How many threads a process takes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from workers.environment import usable_cores, use_threads


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("variable", "asked", "expected"),
    [
        ("3", None, 3),
        ("3,2", None, 3),  # levels of nested regions
        ("3", 2, 2),  # what an experiment asks for goes first
        ("", None, usable_cores()),
        ("0", None, usable_cores()),
        ("many", None, usable_cores()),
    ],
)
def test_threads_are_those_asked_for_then_the_variables_then_all(
    variable: str, asked: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    use_threads(asked)
    assert torch.get_num_threads() == expected


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not tell which cores a process may use")
def test_a_process_that_was_given_one_core_uses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        use_threads(None)
        assert torch.get_num_threads() == 1
    finally:
        os.sched_setaffinity(0, cores)
