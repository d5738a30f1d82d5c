"""Finds the workloads: every module of this package is imported, every ``Workload`` with a card counts."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from pydantic import ValidationError

import workers.workloads
from studio_state.errors import SpecError
from studio_state.experiment import WorkloadSpec
from studio_state.problems import Problem, nearest, schema_problems
from workers.workloads.base import Workload


@cache
def workload_classes() -> dict[str, type[Workload]]:
    """Workload id -> class, sorted by id.

    Raises:
        ImportError: a module of the package cannot be imported; nothing is left out silently.
        TypeError: two classes have the same id.
    """
    found: dict[str, type[Workload]] = {}
    for info in pkgutil.walk_packages(workers.workloads.__path__, f"{workers.workloads.__name__}."):
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            if not _declared_in(value, module.__name__):
                continue
            if value.card.id in found:
                raise TypeError(f"workload id {value.card.id!r} is declared by {found[value.card.id]} and {value}")
            found[value.card.id] = value
    return dict(sorted(found.items()))


def _declared_in(value: object, module: str) -> bool:
    """True for a ``Workload`` class with a card that this very module defines."""
    return isinstance(value, type) and issubclass(value, Workload) and value.__module__ == module and hasattr(value, "card")


def make_workload(spec: WorkloadSpec) -> Workload:
    """The workload with its options set.

    Raises:
        SpecError: unknown id, or options that its schema refuses; carries all problems.
    """
    classes = workload_classes()
    kind = classes.get(spec.id)
    if kind is None:
        raise SpecError(f"there is no workload {spec.id!r}; {nearest(spec.id, list(classes))}allowed: {', '.join(classes)}")
    wrong = schema_problems(spec.options, kind.knob_schema(), f"workload {spec.id}")
    if wrong:
        raise SpecError([Problem(message=m.replace("has no knob", "has no option"), knob=n or None) for n, m in wrong])
    try:
        return kind(**spec.options)
    except ValidationError as error:
        first = error.errors()[0]
        raise SpecError(f"workload {spec.id}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
