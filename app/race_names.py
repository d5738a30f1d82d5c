"""What the lanes of a race are called."""

from __future__ import annotations

from app.components.lanes import lane_name
from app.race import Race


def name_of(race: Race, lane: int) -> str:
    """What a lane is called."""
    if race.spec is None or lane >= len(race.spec.lanes):
        return "Baseline" if lane == 0 else f"Lane {lane}"
    pipeline = race.spec.lanes[lane]
    return lane_name(lane, pipeline.name, pipeline.text())
