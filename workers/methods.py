"""Base class of policies, and how they are found: one file a method, no list to edit."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, ClassVar

from pydantic import ValidationError

from studio_state.catalog import STAGES, Card, Catalog
from studio_state.errors import SpecError
from studio_state.pipeline import Pipeline
from studio_state.resources import Mode, Use
from workers.cards import Declared, knob
from workers.session import Session

__all__ = ["Policy", "card", "discover", "effective", "knob"]


def card(
    *,
    owns: Iterable[str] = (),
    edits: Iterable[str] = (),
    needs: Iterable[str] = (),
    spoils: Iterable[str] = (),
    uses: Iterable[Use] = (),
    **fields: Any,
) -> Card:
    """Shorthand for a card whose resource entries hold at all knob values.

    Args:
        uses: further entries that depend on knobs.
    """
    table: dict[Mode, Iterable[str]] = {"owns": owns, "edits": edits, "needs": needs, "spoils": spoils}
    plain = [Use(resource=r, mode=mode) for mode, names in table.items() for r in names]
    return Card(resources=(*plain, *uses), **fields)


class Policy(Declared):
    """A policy changes how a model runs while it is attached.

    Subclasses set ``card``, declare knobs as fields, and override the seam they need. The
    instance is frozen; the state of a run lives in ``attach``'s own variables, the session or
    the cache.
    """

    card: ClassVar[Card]

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Act on the session while the context is open; undo everything on exit."""
        return nullcontext()

    def prepare(self, session: Session) -> None:
        """Build what takes long (packed weights), once per experiment, outside every timing."""

    def weight_factor(self, bits: int) -> float:
        """Expected weight bytes over the baseline's, for the memory estimate before loading.

        Args:
            bits: of one weight of the baseline.
        """
        return 1.0

    def head_factor(self, bits: int) -> float:
        """The same of the output head alone."""
        return self.weight_factor(bits)

    def kv_factor(self) -> float:
        """Expected KV bytes over the baseline's, for the memory estimate before loading."""
        return 1.0

    def companion(self) -> str:
        """The model that runs beside the lane's own, with weights and a cache of its own; empty = none.

        For the memory estimate before loading.
        """
        return ""

    def why_idle(self, session: Session) -> str:
        """Why the policy may have changed nothing at these knobs, for the ``no effect`` flag."""
        return f"{self.card.title} changed nothing at these knobs; the prompts may be too short for its budget"

    @property
    def is_neutral(self) -> bool:
        """True if the knobs stand where the policy does nothing. (``neutral={}``: it acts, but the output stays.)"""
        neutral = self.card.neutral
        return bool(neutral) and all(getattr(self, k) == v for k, v in neutral.items())

    @classmethod
    def describe(cls) -> Card:
        """The card completed with summary, docstring and knob schema from the class."""
        doc = (cls.__doc__ or "").strip()
        return cls.card.model_copy(
            update={"summary": cls.card.summary or cls.summary_line(), "doc": doc, "knobs": cls.knob_schema()}
        )


def classes_in(package: str, base: type) -> list[type]:
    """All subclasses of ``base`` with a card, defined in the modules of a package, in name order."""
    root = importlib.import_module(package)
    found = []
    for module in sorted(pkgutil.walk_packages(root.__path__, package + "."), key=lambda m: m.name):
        if module.ispkg:
            continue
        loaded = importlib.import_module(module.name)
        found += [
            x
            for x in vars(loaded).values()
            if isinstance(x, type) and issubclass(x, base) and x is not base and x.__module__ == module.name and "card" in vars(x)
        ]
    return found


def unique(classes: Iterable[Any]) -> dict[str, Any]:
    """Id on the card -> class.

    Raises:
        RuntimeError: two files declare the same id.
    """
    found: dict[str, Any] = {}
    for cls in classes:
        if cls.card.id in found:
            raise RuntimeError(f"{cls.__module__} and {found[cls.card.id].__module__} both declare {cls.card.id!r}")
        found[cls.card.id] = cls
    return found


@cache
def discover() -> dict[str, type[Policy]]:
    """Policy id -> class.

    Raises:
        RuntimeError: two files declare the same id.
    """
    return unique(classes_in("workers.policies", Policy))


def catalogue() -> Catalog:
    """All cards, as ``describe`` prints them: policies in the order of their stages, then analyzers, then recipes.

    Raises:
        RuntimeError: two files declare the same id.
    """
    from workers.analyzer import analyzers
    from workers.recipe import recipes
    from workers.workloads.registry import workload_classes

    order = {s: i for i, s in enumerate(STAGES)}
    classes = unique([*discover().values(), *analyzers().values(), *recipes().values()])
    methods = sorted(
        (c.describe() for c in classes.values()),
        key=lambda c: (order.get(c.stage or "", len(order) + (c.kind == "recipe")), c.id),
    )
    return Catalog(methods=methods, workloads=[w.describe() for w in workload_classes().values()])


def effective(pipeline: Pipeline) -> list[Policy]:
    """The policies of a pipeline in the order in which they act.

    Raises:
        SpecError: unknown policy or knob, or a knob out of range.
    """
    known, out = discover(), []
    for step in pipeline.steps:
        if step.policy not in known:
            raise SpecError(f"there is no policy {step.policy!r}; allowed: {', '.join(known)}")
        try:
            out.append(known[step.policy].model_validate(step.knobs))
        except ValidationError as e:
            first = e.errors()[0]
            raise SpecError(f"{step.policy}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from e
    return sorted(out, key=lambda p: STAGES.index(p.card.stage or "runtime"))
