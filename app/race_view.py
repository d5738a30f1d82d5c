"""What the screen shows of a race, as plain data: one function a section of the live page.

All numbers leave here as text (``app.components.numbers``), so the browser only draws.
"""

from __future__ import annotations

from typing import Any

from app.components.lanes import lane_colour, lane_letter, lane_mark
from app.components.numbers import clock, interval_text, metric_quantity, metric_title, ratio_text
from app.race import Race
from app.race_drawn import drawing
from app.race_names import name_of
from app.race_outputs import shown_item
from studio_state.events import Ratio
from studio_state.metrics import METRICS
from studio_state.results import LaneResults

Section = dict[str, Any]

COLUMN_METRICS = (
    "decode_tokens_per_s",
    "score_tokens_per_s",
    "images_per_s",
    "seconds_per_image",
    "denoising_steps_per_s",
    "denoiser_calls",
    "ttft_s",
    "end_to_end_s",
    "perplexity",
    "accuracy",
    "class_agreement",
    "frechet_distance",
    "kl_to_baseline",
    "top1_agreement",
    "psnr",
    "ssim",
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
    "interrupted": "Interrupted",
}
PHASE_WORDS = {
    "fetch": "Fetching the model",
    "load": "Loading the model",
    "build": "Building",
    "warmup": "Warming up",
    "run": "Racing",
    "quality": "Comparing outputs",
    "memory": "Measuring memory",
    "analyze": "Looking for where the time goes",
    "score": "Scoring",
}


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
    largest = max((lane.value(n) or 0.0 for lane in race.lanes for n in MEMORY_METRICS), default=0.0)
    return [_column(race, i, lane, largest) for i, lane in enumerate(race.lanes)]


def _column(race: Race, index: int, lane: LaneResults, largest: float) -> Section:
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
        "items": f"{len(lane.outputs)} of {race.total_items()}" if race.total_items() else "",
        "now": _speed_now(race, index),
        "rows": [row for name in _column_metrics(lane) if (row := metric_row(race, index, name))],
        "memory": [bar for name in MEMORY_METRICS if (bar := _memory_bar(lane, name, largest))],
    }


def _column_metrics(lane: LaneResults) -> tuple[str, ...]:
    """Metrics of a column; of pictures that are drawn the time of one says it all."""
    told = {"images_per_s", "end_to_end_s"} if "seconds_per_image" in lane.sources else set()
    return tuple(name for name in COLUMN_METRICS if name not in told)


def _speed_now(race: Race, lane: int) -> Section | None:
    """The large number of a column: the speed of the item at hand; at the end the lane's own speed."""
    if drawing(race):
        text, unit = metric_quantity("seconds_per_image", race.lanes[lane].value("seconds_per_image"))
        known = "seconds_per_image" in race.lanes[lane].sources
        return {"text": text, "unit": f"{unit or 's'} per picture", "when": "so far" if known and not race.over else ""}
    names = [n for n in ("decode_tokens_per_s", "score_tokens_per_s") if n in race.lanes[lane].sources]
    if race.over and names:
        text, unit = metric_quantity(names[0], race.lanes[lane].value(names[0]))
        return {"text": text, "unit": unit, "when": "scored" if names[0].startswith("score") else "decoded"}
    if not names and "images_per_s" in race.lanes[lane].sources:
        text, unit = metric_quantity("images_per_s", race.lanes[lane].value("images_per_s"))
        return {"text": text, "unit": unit, "when": "" if race.over else "so far"}
    item = shown_item(race, None, lane)
    speed = item.streams[lane].tokens_per_s() if item else None
    if speed is None:
        return None
    text, unit = metric_quantity("decode_tokens_per_s", speed)
    return {"text": text, "unit": unit, "when": "now" if race.running_lane == lane else "last item"}


def _memory_bar(lane: LaneResults, name: str, largest: float) -> Section | None:
    value = lane.value(name)
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
    entry = race.lanes[lane]
    value = entry.value(name)
    if value is None:
        return None
    text, unit = metric_quantity(name, value)
    ratio = entry.ratios.get(name)
    return {
        "name": name,
        "title": metric_title(name),
        "text": text,
        "unit": unit,
        "source": entry.sources[name],
        "final": name in entry.values,
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
    names = {n for lane in race.lanes for n in lane.sources}
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
