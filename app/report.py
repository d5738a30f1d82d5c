"""What came of an experiment as one JSON document: ``--json``, run cards, the table of the command line. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from app.race import Race
from studio_state.events import Event, Metric, Output
from studio_state.results import LaneResults

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
    race = Race()
    race.feed(events)
    return {
        "version": DOCUMENT_VERSION,
        "experiment": _experiment(race),
        "lanes": [_lane(race, i, lane) for i, lane in enumerate(race.lanes)],
    }


def all_finished(report: dict[str, Any]) -> bool:
    """True if the experiment and every lane of it finished."""
    return report["experiment"]["status"] == "finished" and all(lane["status"] == "finished" for lane in report["lanes"])


def _experiment(race: Race) -> dict[str, Any]:
    return {
        "id": race.experiment,
        "status": race.status,
        "message": race.message,
        "problems": race.problems,
        "origin": race.origin,
        "submitted_at": race.submitted_at,
        "seconds": race.seconds,
        "spec": race.spec.model_dump(mode="json") if race.spec else None,
        "digest": race.spec.digest() if race.spec else None,
        "model": race.model.model_dump(mode="json") if race.model else None,
        "estimate": race.estimate.model_dump(mode="json") if race.estimate else None,
        "fits_baseline": race.fits_baseline,
        "environment": race.environment,
        "notes": [{"text": n.text, "level": n.level, "lane": n.lane} for n in race.notes],
    }


def _lane(race: Race, index: int, lane: LaneResults) -> dict[str, Any]:
    pipeline = race.spec.lanes[index] if race.spec and index < len(race.spec.lanes) else None
    names = [n for n in lane.sources if n in lane.values or lane.value(n) is not None]
    return {
        "lane": index,
        "pipeline": pipeline.text() if pipeline else lane.order,
        "name": pipeline.name if pipeline else "",
        "order": lane.order,
        "status": lane.status,
        "message": lane.message,
        "flags": lane.flags,
        "interleaved": lane.interleaved,
        "metrics": {n: lane.value(n) for n in names},
        "sources": {n: lane.sources[n] for n in names},
        "intervals": {n: _interval(m) for n in names if (m := lane.values.get(n)) and (m.low is not None or m.n is not None)},
        "ratios": {name: {"value": r.value, "low": r.low, "high": r.high, "n": r.n} for name, r in lane.ratios.items()},
        "outputs": [_output(o) for o in lane.outputs.values()],
    }


def _interval(metric: Metric) -> dict[str, Any]:
    return {"low": metric.low, "high": metric.high, "n": metric.n}


def _output(output: Output) -> dict[str, Any]:
    return output.model_dump(mode="json", include={"item", "repeat", "kind", "text", "expected", "correct", "data"})
