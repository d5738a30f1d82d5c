"""Errors that a person reads. Every message says what was given, what is allowed, what to do.

StudioError
├── SpecError          a pipeline or experiment that cannot run; carries all its problems
├── ModelError         a model that cannot be found or loaded
├── WorkloadError      items that cannot be read or made
├── Unavailable        a thing that cannot work on this machine, with the reason
├── DeviceBusy         another process owns the device
├── WorkerLost         the worker process died
├── StoreError         the data directory or its database cannot be used
└── SqlError           a query that is refused, wrong, too slow or too large
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from studio_state.problems import Problem


class StudioError(Exception):
    """Base of all errors shown to a person as one plain sentence."""


class SpecError(StudioError):
    """A specification that is refused before anything runs.

    Args:
        problems: all problems found, each tied to the policy and knob that cause it.
    """

    def __init__(self, problems: Sequence[Problem] | str):
        from studio_state.problems import Problem

        self.problems = [Problem(message=problems)] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(p.sentence() for p in self.problems))


class ModelError(StudioError):
    """A model that cannot be found, read or loaded."""


class WorkloadError(StudioError):
    """Workload items that cannot be read or generated."""


class Unavailable(StudioError):
    """A method or device that cannot work here; the message is the reason."""


class DeviceBusy(StudioError):
    """Another process owns the device."""


class WorkerLost(StudioError):
    """The worker process ended before its experiment did."""


class StoreError(StudioError):
    """The data directory or the database in it cannot be used."""


class SqlError(StudioError):
    """A query that is refused, wrong, too slow or too large."""
