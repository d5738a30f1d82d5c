"""Why each lane is as fast as it is, as lines for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from studio_state.catalog import Catalog
from studio_state.costs import Device
from studio_state.events import Analysis, Event
from studio_state.pipeline import Pipeline
from studio_state.speed_story import ROOFLINE, stories

PHASES = {"decode": "a decode step", "prefill": "the prompt", "pass": "a pass"}


def explained(report: dict[str, Any], events: Sequence[Event]) -> list[str]:
    """One line a sentence; none where the experiment asked for no analyzers."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        if isinstance(event, Analysis):
            found.setdefault(event.lane, {})[event.analyzer] = event.data
    spec = report["experiment"]["spec"] or {}
    reference, lines = spec.get("reference", 0), []
    cards = Catalog.load().by_id if found else {}
    for lane in sorted(found.keys() - {reference}):
        steps = Pipeline.model_validate(spec["lanes"][lane]).steps
        told = stories(found.get(reference, {}), found[lane], [(cards[s.policy], s.knobs) for s in steps if s.policy in cards])
        lines += [f"lane {lane}, {PHASES[s.phase]}: {said}" for s in told for said in s.sentences()]
    limits = found.get(reference, {}).get(ROOFLINE, {}).get("device")
    return [*lines, f"The roofline is {(d := Device.model_validate(limits)).name}'s, {d.origin}."] if lines and limits else lines
