"""What the screen shows of a race, as plain data: one function a section of the live page.

All numbers leave here as text (``app.components.numbers``), so the browser only draws.
"""

from __future__ import annotations

from typing import Any

from app.components.lanes import lane_colour, lane_letter, lane_mark, lane_name
from app.components.numbers import clock, interval_text, metric_quantity, metric_title, ratio_text
from app.race import Item, Lane, Race, Stream
from app.race_diff import diff, runs
from studio_state.events import Kept, Ratio
from studio_state.metrics import METRICS

Section = dict[str, Any]

COLUMN_METRICS = (
    "decode_tokens_per_s",
    "score_tokens_per_s",
    "ttft_s",
    "end_to_end_s",
    "perplexity",
    "accuracy",
    "kl_to_baseline",
    "top1_agreement",
    "same_output",
)
MEMORY_METRICS = ("weight_bytes", "kv_bytes", "peak_memory_bytes")
GROUPS = ("speed", "memory", "quality", "count")
STATUS_WORDS = {
    "queued": "Waiting in the queue",
    "running": "Running",
    "finished": "Finished",
    "failed": "Failed",
    "cancelled": "Cancelled",
}
PHASE_WORDS = {
    "fetch": "Fetching the model",
    "load": "Loading the model",
    "build": "Building",
    "warmup": "Warming up",
    "run": "Racing",
    "quality": "Comparing outputs",
    "memory": "Measuring memory",
    "score": "Scoring",
}


def name_of(race: Race, lane: int) -> str:
    """What a lane is called."""
    if race.spec is None or lane >= len(race.spec.lanes):
        return "Baseline" if lane == 0 else f"Lane {lane}"
    pipeline = race.spec.lanes[lane]
    return lane_name(lane, pipeline.name, pipeline.text())


def head(race: Race, now: float, place: int | None = None) -> Section:
    """Status line: what runs, how far it is, how long it will take, what went wrong.

    Args:
        now: unix time in seconds.
        place: place in the queue, 1 = next.
    """
    done, eta = race.progress(), race.eta(now)
    until = race.ended_at or now
    since = race.started_at or race.submitted_at
    return {
        "experiment": race.experiment,
        "status": race.status,
        "title": _title(race),
        "text": _status_text(race, place),
        "done": 1.0 if race.status == "finished" else done,
        "elapsed": clock(until - since) if since else "",
        "eta": f"about {clock(eta)} left" if eta is not None and eta >= 1 else "",
        "message": race.message,
        "notes": [n.text for n in race.notes[-6:]]
        + ([] if race.fits_baseline else ["No baseline on this device: it does not fit."]),
        "over": race.over,
    }


def _title(race: Race) -> str:
    if race.spec is None:
        return race.experiment
    model = race.model.title if race.model and race.model.title else race.spec.model
    return f"{model} · {race.spec.workload.id} · {race.spec.device}"


def _status_text(race: Race, place: int | None) -> str:
    if race.status == "queued":
        return f"{STATUS_WORDS['queued']}: place {place}" if place else STATUS_WORDS["queued"]
    if race.status != "running" or race.phase is None:
        return STATUS_WORDS.get(race.status, race.status)
    words = PHASE_WORDS.get(race.phase.name, race.phase.name)
    lane = f", {name_of(race, race.phase.lane)}" if race.phase.lane is not None else ""
    share = f" {100 * race.phase.done:.0f} %" if race.phase.done is not None else ""
    return f"{words}{lane}{share}" + (f": {race.phase.text}" if race.phase.text else "")


def lanes(race: Race) -> list[Section]:
    """One column per lane: who it is, how it stands, its numbers, its memory."""
    largest = max((_largest_memory(lane) for lane in race.lanes), default=0.0)
    return [_column(race, i, lane, largest) for i, lane in enumerate(race.lanes)]


def _column(race: Race, index: int, lane: Lane, largest: float) -> Section:
    steps = race.spec.lanes[index].text() if race.spec and index < len(race.spec.lanes) else ""
    return {
        "lane": index,
        "name": name_of(race, index),
        "letter": lane_letter(index),
        "mark": lane_mark(index),
        "colour": lane_colour(index),
        "steps": lane.order or steps,
        "status": lane.status,
        "active": race.running_lane == index,
        "message": lane.message,
        "flags": lane.flags + ([] if lane.interleaved else ["Ran in a block of its own, not interleaved with the others."]),
        "items": f"{len(lane.items_done)} of {race.total_items()}" if race.total_items() else "",
        "now": _speed_now(race, index),
        "rows": [row for name in COLUMN_METRICS if (row := metric_row(race, index, name))],
        "memory": [bar for name in MEMORY_METRICS if (bar := _memory_bar(lane, name, largest))],
    }


def _speed_now(race: Race, lane: int) -> Section | None:
    """The large number of a column: the speed of the item at hand; at the end the lane's own speed."""
    names = [n for n in ("decode_tokens_per_s", "score_tokens_per_s") if n in race.lanes[lane].values]
    if race.over and names:
        text, unit = metric_quantity(names[0], race.lanes[lane].values[names[0]].value())
        return {"text": text, "unit": unit, "when": "scored" if names[0].startswith("score") else "decoded"}
    item = shown_item(race, None, lane)
    speed = item.streams[lane].tokens_per_s() if item else None
    if speed is None:
        return None
    text, unit = metric_quantity("decode_tokens_per_s", speed)
    return {"text": text, "unit": unit, "when": "now" if race.running_lane == lane else "last item"}


def shown_item(race: Race, item_id: str | None, lane: int) -> Item | None:
    """The item whose output a lane's column shows: the chosen one, else the latest that this lane has begun."""
    if item_id is not None:
        item = race.items.get(item_id)
        return item if item and lane in item.streams else None
    return next((i for i in reversed(race.items.values()) if lane in i.streams), None)


def _largest_memory(lane: Lane) -> float:
    return max((lane.values[n].value() or 0.0 for n in MEMORY_METRICS if n in lane.values), default=0.0)


def _memory_bar(lane: Lane, name: str, largest: float) -> Section | None:
    value = lane.values[name].value() if name in lane.values else None
    if value is None:
        return None
    text, unit = metric_quantity(name, value)
    ratio = lane.ratios.get(name)
    return {
        "title": {"weight_bytes": "Weights", "kv_bytes": "KV", "peak_memory_bytes": "Peak"}[name],
        "text": text,
        "unit": unit,
        "share": value / largest if largest else 0.0,
        "ratio": ratio_text(ratio.value) if ratio else "",
    }


def metric_row(race: Race, lane: int, name: str) -> Section | None:
    """A metric of one lane with its ratio to the reference; None where it has no value."""
    entry = race.lanes[lane].values.get(name)
    value = entry.value() if entry else None
    if entry is None or value is None:
        return None
    text, unit = metric_quantity(name, value)
    ratio = race.lanes[lane].ratios.get(name)
    return {
        "name": name,
        "title": metric_title(name),
        "text": text,
        "unit": unit,
        "source": entry.source,
        "final": entry.is_final,
        "ratio": ratio_text(ratio.value) if ratio else "",
        "interval": interval_text(ratio.low, ratio.high) if ratio else "",
        "verdict": verdict(name, ratio) if ratio else "",
        "help": METRICS[name].text if name in METRICS else "",
    }


def verdict(name: str, ratio: Ratio) -> str:
    """``better``, ``worse`` or ``no clear difference`` from a ratio and its interval; empty where neither way is better."""
    way = METRICS[name].better if name in METRICS else "neither"
    if way == "neither":
        return ""
    low, high = ratio.low if ratio.low is not None else ratio.value, ratio.high if ratio.high is not None else ratio.value
    if low <= 1.0 <= high:
        return "same" if low == high == 1.0 else "no clear difference"
    return "better" if (low > 1.0) == (way == "higher") else "worse"


def table(race: Race) -> Section:
    """Every metric of every lane, grouped; cells carry value, unit, ratio and interval."""
    reference = race.spec.reference if race.spec else 0
    names = {n for lane in race.lanes for n in lane.values}
    ordered = [n for g in GROUPS for n in METRICS if n in names and METRICS[n].group == g] + sorted(names - METRICS.keys())
    rows = []
    for name in ordered:
        cells = [metric_row(race, i, name) for i in range(len(race.lanes))]
        if any(cells):
            group = METRICS[name].group if name in METRICS else "count"
            rows.append(
                {
                    "name": name,
                    "title": metric_title(name),
                    "group": group,
                    "help": METRICS[name].text if name in METRICS else "",
                    "cells": cells,
                }
            )
    columns = [
        {
            "name": name_of(race, i),
            "letter": lane_letter(i),
            "mark": lane_mark(i),
            "colour": lane_colour(i),
            "status": lane.status,
        }
        for i, lane in enumerate(race.lanes)
    ]
    return {"columns": columns, "rows": rows, "reference": name_of(race, reference)}


def item_choices(race: Race) -> list[Section]:
    """The items begun so far, for the item picker."""
    return [{"id": i.id, "label": f"{i.index + 1} of {i.of}" if i.of else i.id} for i in race.items.values()]


def streams(race: Race, item_id: str | None) -> Section:
    """The text of every lane for one item, compared with the reference's."""
    item = race.items.get(item_id or race.current or "")
    if item is None:
        return {"item": None, "choices": [], "lanes": []}
    reference = race.spec.reference if race.spec else 0
    return {
        "item": item.id,
        "following": item_id is None,
        "choices": item_choices(race),
        "prompt": item.prompt,
        "lanes": [_text(race, shown_item(race, item_id, i), i, reference, item) for i in range(len(race.lanes))],
    }


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
            note = f"first differs after {d.first} tokens; {d.equal} of {d.total} tokens equal"
        elif against.outcome and stream.outcome:
            note = f"all {d.total} tokens equal"
    out = stream.outcome
    if not parts and out is not None and out.text:
        parts = [(out.text, False)]
    return {
        "lane": lane,
        "runs": parts,
        "note": note,
        "live": out is None and race.running_lane == lane and race.current == item.id,
        "correct": out.correct if out else None,
        "expected": out.expected if out else None,
        "earlier": "" if item is current else f"item {item.index + 1}",
    }


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
