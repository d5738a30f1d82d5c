"""How long an experiment will take, judged by an earlier run of the same model and workload on this studio."""

from __future__ import annotations

from collections.abc import Iterable

from app.components.numbers import clock
from app.race import Race
from studio_state.catalog import Catalog
from studio_state.experiment import ExperimentSpec


def estimate_seconds(spec: ExperimentSpec, races: Iterable[Race], catalog: Catalog) -> float | None:
    """Seconds from start to end; None where no earlier run compares.

    Start-up counts once, the rest in proportion to lanes, items and repeats. The newest fitting run decides.
    """
    for race in races:
        before = race.spec
        if before is None or race.status != "finished" or None in (race.started_at, race.first_item_at, race.ended_at):
            continue
        if (before.model, before.workload.id, before.device) != (spec.model, spec.workload.id, spec.device):
            continue
        setup, work = race.first_item_at - race.started_at, race.ended_at - race.first_item_at  # type: ignore[operator]
        return setup + work * _size(spec, catalog) / _size(before, catalog)
    return None


def _size(spec: ExperimentSpec, catalog: Catalog) -> float:
    """Lanes x items x repeats."""
    card = catalog.workload_by_id.get(spec.workload.id)
    options = {**(card.defaults() if card else {}), **spec.workload.options}
    items = options.get("items")
    return len(spec.lanes) * (items if isinstance(items, int) and items > 0 else 1) * spec.repeats


def estimate_text(seconds: float | None) -> str:
    """The estimate as a sentence."""
    if seconds is None:
        return "No run of this model and workload yet to judge the time by."
    return f"About {clock(seconds)}, judged by the last run of this model and workload."
