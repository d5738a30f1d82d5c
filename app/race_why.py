"""What the screen shows of why a lane is as fast as it is: its step in parts, what its policies can touch, the roofline. Pure."""

from __future__ import annotations

from functools import cache
from typing import Any

from app.components.lanes import lane_colour, lane_letter, lane_mark
from app.components.numbers import NO_VALUE, digits, ratio_text, seconds_quantity
from app.race import Race
from app.race_names import name_of
from studio_state.catalog import Card, Catalog
from studio_state.costs import Device, Group, Work, total
from studio_state.devices import published
from studio_state.speed_story import DISSECTION, KINDS, MAPS, ROOFLINE, Story, stories

Section = dict[str, Any]
Point = tuple[int, Group, list[Work], float]  # lane, part, its operations, measured seconds
PHASES = {"decode": "One decode step", "prefill": "Reading the prompt", "pass": "One pass"}
PARTS: dict[Group, tuple[str, ...]] = {"maps": MAPS, "attention": ("attention",)}  # group of the roofline -> measured kinds


@cache
def _cards() -> dict[str, Card]:
    return Catalog.load().by_id


def why(race: Race, item_id: str | None = None) -> Section:
    """A figure a phase: every lane's step in parts with its sentences, and where it stands under the roofline."""
    reference = race.spec.reference if race.spec else 0
    base = race.analyses.get(reference, {})
    found = [_phase(race, phase, reference) for phase in PHASES if phase in base.get(DISSECTION, {}).get("phases", {})]
    return {"kinds": [{"id": k, "title": t} for k, t in KINDS.items()], "phases": found}


def _phase(race: Race, phase: str, reference: int) -> Section:
    base = race.analyses[reference]
    lanes, longest = [], 0.0
    for lane in sorted(race.analyses):
        steps = race.spec.lanes[lane].steps if race.spec and lane < len(race.spec.lanes) else ()
        cards = [(_cards()[s.policy], s.knobs) for s in steps if s.policy in _cards()]
        story = next((s for s in stories(base, race.analyses[lane], cards) if s.phase == phase), None)
        if story is not None:
            longest = max(longest, story.seconds)
            lanes.append(_lane(race, lane, story, lane == reference))
    for one in lanes:
        one["width"] = one.pop("whole") / longest if longest else 0
    return {
        "id": phase,
        "title": PHASES[phase],
        "lanes": lanes,
        "table": {"head": ["Lane", "Time", *KINDS.values()], "rows": [one.pop("row") for one in lanes]},
        "roofline": _roofline(race, phase),
    }


def _lane(race: Race, lane: int, story: Story, is_reference: bool) -> Section:
    text, unit = seconds_quantity(story.seconds)
    shares = {k: max(0.0, story.kinds.get(k, 0.0)) / story.seconds for k in KINDS}
    told = [f"{100 * share:.0f} %" for share in shares.values()]
    return {
        "lane": lane,
        "name": name_of(race, lane),
        "letter": lane_letter(lane),
        "mark": lane_mark(lane),
        "colour": lane_colour(lane),
        "whole": story.seconds,
        "time": f"{text} {unit}",
        "ratio": "" if is_reference else f"{ratio_text(story.gained)} as fast",
        "parts": [{"kind": k, "share": share} for k, share in shares.items()],
        "label": f"{text} {unit}: " + ", ".join(f"{KINDS[k]} {t}" for k, t in zip(shares, told, strict=True)),
        "sentences": [] if is_reference else story.sentences(),
        "row": [name_of(race, lane), f"{text} {unit}", *told],
    }


def _roofline(race: Race, phase: str) -> Section | None:
    """Operations a byte of maps and attention under the limits of the device that ran, and of those that makers publish.

    What ran is measured. Of another device there is only what its limits allow, for the same operations and bytes.
    """
    points, device, dtype = [], None, ""
    for lane in sorted(race.analyses):
        data = race.analyses[lane]
        roof = data.get(ROOFLINE, {}).get("phases", {}).get(phase)
        kinds = data.get(DISSECTION, {}).get("phases", {}).get(phase, {}).get("kinds")
        if not roof or not kinds:
            continue
        device, dtype = Device.model_validate(data[ROOFLINE]["device"]), data[ROOFLINE]["dtype"]
        for group, measured in PARTS.items():
            works = [
                Work.model_validate({k: o[k] for k in Work.model_fields if k in o})
                for o in roof["operations"]
                if o["group"] == group
            ]
            seconds = sum(kinds.get(k, 0.0) for k in measured)
            if sum(w.flops for w in works) > 0 and sum(w.bytes for w in works) > 0 and seconds > 0:
                points.append((lane, group, works, seconds))
    if device is None or not points:
        return None
    here = {"id": "", "title": f"{device.name}, this one", **_under(race, points, device, dtype, True)}
    others = [{"id": i, "title": d.name, **_under(race, points, d, dtype, False)} for i, d in published().items()]
    return {"devices": [here, *others]}


def _under(race: Race, points: list[Point], device: Device, dtype: str, ran: bool) -> Section:
    """The points under one device's limits."""
    shown, rows = [], []
    for lane, group, works, seconds in points:
        name, part = name_of(race, lane), "linear maps" if group == "maps" else group
        work = total(works, group, group)
        least = sum(w.seconds(device, dtype) for w in works)
        speed, (text, unit) = work.flops / (seconds if ran else least), seconds_quantity(least)
        shown.append(
            {
                "lane": lane,
                "name": name,
                "mark": lane_mark(lane),
                "letter": lane_letter(lane),
                "colour": lane_colour(lane),
                "group": part,
                "x": work.intensity,
                "y": speed,
                "text": f"{name}, {part}: {digits(work.intensity)} operations a byte, "
                f"{'' if ran else 'at most '}{digits(speed / 1e9)} billion operations a second",
            }
        )
        limit = min(device.best(dtype), work.intensity * device.bandwidth)
        rows.append(
            [name, part, digits(work.intensity), digits(speed / 1e9) if ran else NO_VALUE, digits(limit / 1e9), f"{text} {unit}"]
        )
    return {
        "points": shown,
        "bandwidth": device.bandwidth,
        "peak": device.best(dtype),
        "ridge": device.ridge(dtype),
        "summary": (
            f"{device.name}: {digits(device.bandwidth / 1e9)} GB/s and {digits(device.best(dtype) / 1e9)} billion {_format(device, dtype)} operations "
            f"a second, {device.origin}; left of {digits(device.ridge(dtype))} operations a byte memory is the limit. Activations between "
            f"operations count as memory traffic.{'' if ran else ' Nothing ran on it: the points are what its limits allow.'}"
        ),
        "table": {
            "head": ["Lane", "Part", "Operations a byte", "Billion operations a second", "Limit", "Least time"],
            "rows": rows,
        },
    }


def _format(device: Device, dtype: str) -> str:
    """The number format whose peak counts: of one that is not published, the fastest floats that are."""
    return dtype if dtype in device.peak else next(k for k, v in device.peak.items() if v == device.best(dtype))
