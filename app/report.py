"""What came of an experiment as one JSON document: ``--json``, run cards, the table of the command line. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from app.race import Race
from app.race_parts import Lane, Value
from studio_state.events import Event, Finished, Output, Started

DOCUMENT_VERSION = 1


def document(events: Iterable[Event]) -> dict[str, Any]:
    """The document of one experiment, finished or not.

    ::

        {"version", "experiment": {"id", "status", "message", "spec", "model", "environment", ...},
         "lanes": [{"pipeline", "status", "metrics": {name: value}, "sources": {name: source},
                    "ratios": {name: {"value", "low", "high", "n"}}, "interleaved", "outputs": [...], ...}]}

    A metric whose lane has not given its value yet is summarized from its items, as ``METRICS`` says.
    A ratio is lane / reference. ``pipeline`` is as written, ``order`` as it acts.

    Args:
        events: in order, from the first.
    """
    kept = list(events)
    race = Race(kept[0].experiment if kept else "")
    race.feed(kept)
    outputs: dict[int, list[Output]] = {}
    for event in kept:
        if isinstance(event, Output):
            outputs.setdefault(event.lane, []).append(event)
    return {
        "version": DOCUMENT_VERSION,
        "experiment": _experiment(race, kept),
        "lanes": [_lane(race, i, lane, outputs.get(i, [])) for i, lane in enumerate(race.lanes)],
    }


def all_finished(report: dict[str, Any]) -> bool:
    """True if the experiment and every lane of it finished."""
    return report["experiment"]["status"] == "finished" and all(lane["status"] == "finished" for lane in report["lanes"])


def _experiment(race: Race, events: list[Event]) -> dict[str, Any]:
    return {
        "id": race.experiment,
        "status": race.status,
        "message": race.message,
        "problems": race.problems,
        "origin": race.origin,
        "submitted_at": race.submitted_at,
        "seconds": next((e.seconds for e in events if isinstance(e, Finished)), None),
        "spec": race.spec.model_dump(mode="json") if race.spec else None,
        "digest": race.spec.digest() if race.spec else None,
        "model": race.model.model_dump(mode="json") if race.model else None,
        "estimate": race.estimate.model_dump(mode="json") if race.estimate else None,
        "fits_baseline": race.fits_baseline,
        "environment": next((e.environment for e in events if isinstance(e, Started)), {}),
        "notes": [{"text": n.text, "level": n.level, "lane": n.lane} for n in race.notes],
    }


def _lane(race: Race, index: int, lane: Lane, outputs: list[Output]) -> dict[str, Any]:
    pipeline = race.spec.lanes[index] if race.spec and index < len(race.spec.lanes) else None
    values = {name: v for name, v in lane.values.items() if v.is_final or v.value() is not None}
    return {
        "lane": index,
        "pipeline": pipeline.text() if pipeline else lane.order,
        "name": pipeline.name if pipeline else "",
        "order": lane.order,
        "status": lane.status,
        "message": lane.message,
        "flags": lane.flags,
        "interleaved": lane.interleaved,
        "metrics": {name: v.value() for name, v in values.items()},
        "sources": {name: v.source for name, v in values.items()},
        "intervals": {name: _interval(v) for name, v in values.items() if v.low is not None or v.n is not None},
        "ratios": {name: {"value": r.value, "low": r.low, "high": r.high, "n": r.n} for name, r in lane.ratios.items()},
        "outputs": [_output(o) for o in outputs],
    }


def _interval(value: Value) -> dict[str, Any]:
    return {"low": value.low, "high": value.high, "n": value.n}


def _output(output: Output) -> dict[str, Any]:
    return output.model_dump(mode="json", include={"item", "repeat", "kind", "text", "expected", "correct", "data"})
