"""What lanes made of an item, as the screen shows it: texts with their differences, and the eviction map."""

from __future__ import annotations

from typing import Any

from app.components.lanes import lane_colour, lane_mark
from app.race import Race
from app.race_diff import diff, runs
from app.race_drawn import drawing, place_of, told
from app.race_images import bars
from app.race_names import name_of
from app.race_parts import Item, Stream
from studio_state.events import Kept, Output

Section = dict[str, Any]

SHORT = 32  # characters of an answer that is read at a glance


def shown_item(race: Race, item_id: str | None, lane: int) -> Item | None:
    """The item whose output a lane's column shows: the chosen one, else the latest that this lane has begun."""
    if item_id is not None:
        item = race.items.get(item_id)
        return item if item and lane in item.streams else None
    return next((i for i in reversed(race.items.values()) if lane in i.streams), None)


def item_choices(race: Race) -> list[Section]:
    """The items begun so far, for the item picker."""
    return [{"id": i.id, "label": f"{i.index + 1} of {i.of}" if i.of else i.id} for i in race.items.values()]


def streams(race: Race, item_id: str | None) -> Section:
    """The text of every lane for one item, compared with the reference's."""
    item = race.items.get(item_id or race.current or "")
    if item is None:
        return {"item": None, "choices": [], "lanes": []}
    reference = race.spec.reference if race.spec else 0
    draws = drawing(race)
    shown = [(i, shown_item(race, item_id, i)) for i in range(len(race.lanes))]
    return {
        "item": item.id,
        "following": item_id is None,
        "choices": item_choices(race),
        "prompt": race.prompts.get(item.id, ""),
        "place": place_of(item),
        "drawing": draws,
        "lanes": [_drawn(race, mine, i, item) if draws else _text(race, mine, i, reference, item) for i, mine in shown],
    }


def _drawn(race: Race, item: Item | None, lane: int, current: Item) -> Section:
    """A lane's column where pictures are drawn: the newest look at the picture, or what came of it."""
    earlier = "" if item is None or item is current else f"item {item.index + 1}"
    return {"lane": lane, "item": item.id if item else "", "earlier": earlier, "drawn": told(race, lane, item)}


def _text(race: Race, item: Item | None, lane: int, reference: int, current: Item) -> Section:
    stream = item.streams.get(lane) if item else None
    if item is None or stream is None:
        return {"lane": lane, "runs": [], "note": "", "live": False, "earlier": ""}
    against = item.streams.get(reference)
    note, parts = "", runs(stream, [False] * sum(map(len, stream.ids)))
    if against is not None and lane != reference and stream.ids:
        d = diff(stream, against)
        parts = d.runs
        if d.first is not None:
            note = f"first differs after {d.first} tokens; {d.equal} of {d.total} tokens in common"
        elif against.outcome and stream.outcome:
            note = f"all {d.total} tokens equal"
    out = stream.outcome
    short = item.picture is not None and out is not None and len(out.text.strip()) <= SHORT
    if short and out is not None and out.text and lane != reference:
        note = _agrees(race, out, against.outcome if against else None)
    if not parts and out is not None and out.text:
        parts = [(out.text, "same")]
    return {
        "lane": lane,
        "runs": parts,
        "note": note,
        "live": out is None and race.running_lane == lane and race.current == item.id,
        "correct": out.correct if out else None,
        "expected": out.expected if out else None,
        "earlier": "" if item is current else f"item {item.index + 1}",
        "short": short,
        "item": item.id,
        "bars": bars(out) if out else [],
    }


def _agrees(race: Race, mine: Output | None, theirs: Output | None) -> str:
    """Whether a short answer is the reference's, in words."""
    if mine is None or theirs is None:
        return ""
    same = mine.text.strip() == theirs.text.strip()
    return f"{'same as' if same else 'differs from'} {name_of(race, race.spec.reference if race.spec else 0).lower()}"


def kept(race: Race, item_id: str | None) -> Section:
    """The eviction map: the prompt of one item in pieces, and the share of the cache that each lane kept of each."""
    item = race.items.get(item_id or race.current or "")
    if item is None or not item.kept:
        latest = [i for i in race.items.values() if i.kept]
        item = latest[-1] if latest and item_id is None else None
    if item is None:
        return {"item": None, "pieces": [], "lanes": []}
    return {"item": item.id, "pieces": item.pieces, "lanes": [_kept_lane(race, i, k) for i, k in sorted(item.kept.items())]}


def _kept_lane(race: Race, lane: int, event: Kept) -> Section:
    total, held = len(event.share), sum(event.share)
    gone = sum(s == 0 for s in event.share)
    text = f"{name_of(race, lane)} keeps {held:,.0f} of {total:,} prompt tokens ({100 * held / total:.0f} %), mean over layers and heads"
    return (
        {
            "lane": lane,
            "name": name_of(race, lane),
            "mark": lane_mark(lane),
            "colour": lane_colour(lane),
            "share": [round(s, 3) for s in event.share],
            "layers": event.layers,
            "summary": text + (f"; {gone:,} are gone everywhere." if gone else "."),
        }
        if total
        else {
            "lane": lane,
            "name": name_of(race, lane),
            "mark": lane_mark(lane),
            "colour": lane_colour(lane),
            "share": [],
            "layers": [],
            "summary": "",
        }
    )


def stream_of(race: Race, item_id: str | None, lane: int) -> Stream | None:
    """The stream that a lane's column shows."""
    item = shown_item(race, item_id, lane)
    return item.streams[lane] if item else None
