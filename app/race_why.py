"""What the screen shows of why a lane is as fast as it is: its step in parts, what its policies can touch, the roofline. Pure."""

from __future__ import annotations

from functools import cache
from typing import Any

from app.components.lanes import lane_colour, lane_letter, lane_mark
from app.components.numbers import digits, ratio_text, seconds_quantity
from app.race import Race
from app.race_names import name_of
from studio_state.catalog import Card, Catalog
from studio_state.costs import Device
from studio_state.speed_story import DISSECTION, KINDS, MAPS, ROOFLINE, Story, stories

Section = dict[str, Any]
PHASES = {"decode": "One decode step", "prefill": "Reading the prompt", "pass": "One pass"}
PARTS = {"maps": MAPS, "attention": ("attention",)}  # group of the roofline -> measured kinds


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
    """Operations a byte and operations a second, measured, of maps and attention; the device's two limits."""
    points, device, dtype = [], None, ""
    for lane in sorted(race.analyses):
        data = race.analyses[lane]
        roof = data.get(ROOFLINE, {}).get("phases", {}).get(phase)
        kinds = data.get(DISSECTION, {}).get("phases", {}).get(phase, {}).get("kinds")
        if not roof or not kinds:
            continue
        device, dtype = Device.model_validate(data[ROOFLINE]["device"]), data[ROOFLINE]["dtype"]
        for group, measured in PARTS.items():
            some = [o for o in roof["operations"] if o["group"] == group]
            flops, moved = sum(o["flops"] for o in some), sum(o["bytes"] for o in some)
            seconds = sum(kinds.get(k, 0.0) for k in measured)
            if flops > 0 and moved > 0 and seconds > 0:
                points.append(
                    {
                        "lane": lane,
                        "name": name_of(race, lane),
                        "mark": lane_mark(lane),
                        "letter": lane_letter(lane),
                        "colour": lane_colour(lane),
                        "group": "linear maps" if group == "maps" else group,
                        "x": flops / moved,
                        "y": flops / seconds,
                        "text": f"{name_of(race, lane)}, {'linear maps' if group == 'maps' else group}: {digits(flops / moved)} operations a byte, "
                        f"{digits(flops / seconds / 1e9)} billion operations a second",
                    }
                )
    if device is None or not points:
        return None
    ridge = device.ridge(dtype)
    return {
        "points": points,
        "bandwidth": device.bandwidth,
        "peak": device.best(dtype),
        "ridge": ridge,
        "summary": (
            f"{device.name}: {digits(device.bandwidth / 1e9)} GB/s and {digits(device.best(dtype) / 1e9)} billion {dtype} operations a second, "
            f"{device.source}; left of {digits(ridge)} operations a byte memory is the limit. Activations between operations count as memory traffic."
        ),
        "table": {
            "head": ["Lane", "Part", "Operations a byte", "Billion operations a second", "Limit"],
            "rows": [
                [
                    p["name"],
                    p["group"],
                    digits(p["x"]),
                    digits(p["y"] / 1e9),
                    digits(min(device.best(dtype), p["x"] * device.bandwidth) / 1e9),
                ]
                for p in points
            ],
        },
    }
