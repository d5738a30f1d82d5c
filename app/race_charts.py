"""The live charts as plain data. Every chart carries a table and a one-sentence summary."""

from __future__ import annotations

from typing import Any

from app.components.lanes import lane_colour, lane_letter, lane_mark
from app.components.numbers import digits, interval_text, metric_quantity, metric_title, ratio_text
from app.race import Race
from app.race_drawn import drawing
from app.race_names import name_of
from app.race_outputs import stream_of
from app.race_view import verdict
from studio_state.metrics import METRICS

Chart = dict[str, Any]
MAX_POINTS = 160
RATIO_METRICS = (
    "decode_tokens_per_s",
    "score_tokens_per_s",
    "prefill_tokens_per_s",
    "images_per_s",
    "denoising_steps_per_s",
    "denoiser_calls",
    "ttft_s",
    "end_to_end_s",
    "weight_bytes",
    "kv_bytes",
    "peak_memory_bytes",
    "perplexity",
    "accuracy",
    "class_agreement",
    "frechet_distance",
)
PACE_METRICS = ("decode_tokens_per_s", "score_tokens_per_s", "accuracy", "seconds_per_image", "images_per_s", "nll")


def charts(race: Race, item_id: str | None) -> list[Chart]:
    """All charts that have something to show."""
    return [c for c in (tokens_over_time(race, item_id), per_item(race), ratios(race)) if c]


def _series(race: Race, lane: int, points: list[tuple[float, float]]) -> dict[str, Any]:
    return {
        "lane": lane,
        "name": name_of(race, lane),
        "letter": lane_letter(lane),
        "mark": lane_mark(lane),
        "colour": lane_colour(lane),
        "points": thin(points),
    }


def thin(points: list[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most this many points, evenly chosen, first and last included."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def tokens_over_time(race: Race, item_id: str | None) -> Chart | None:
    """The race itself: tokens of one item against seconds, every lane from its own start."""
    series, rows = [], []
    for lane in range(len(race.lanes)):
        stream = stream_of(race, item_id, lane)
        if stream is None or not stream.at:
            continue
        series.append(_series(race, lane, [(round(t, 4), i + 1) for i, t in enumerate(stream.at)]))
        speed = metric_quantity("decode_tokens_per_s", stream.tokens_per_s())
        rows.append(
            [
                name_of(race, lane),
                f"{len(stream.at)}",
                str(metric_quantity("ttft_s", stream.at[0])),
                digits(stream.at[-1]) + " s",
                str(speed),
            ]
        )
    if not series:
        return None
    fastest = max(series, key=lambda s: s["points"][-1][1] / max(s["points"][-1][0], 1e-9))
    return {
        "id": "race",
        "kind": "lines",
        "title": "Tokens over time",
        "x": "seconds since the lane began the item",
        "y": "tokens",
        "series": series,
        "summary": f"{fastest['name']} is ahead: {fastest['points'][-1][1]} tokens in {digits(fastest['points'][-1][0])} s.",
        "table": {"head": ["Lane", "Tokens", "First token", "Time", "Speed"], "rows": rows},
    }


def per_item(race: Race) -> Chart | None:
    """The first pace metric that has values, item by item."""
    for name in PACE_METRICS:
        lanes = [(i, lane.samples[name]) for i, lane in enumerate(race.lanes) if name in lane.samples]
        if any(len(samples) > 1 for _, samples in lanes):
            break
    else:
        return None
    series = [_series(race, i, _running(race, name, samples)) for i, samples in lanes]
    unit = metric_quantity(name, 1.0).unit if METRICS[name].unit else ""
    title = f"{metric_title(name)} {'so far' if name == 'accuracy' else 'item by item'}"
    return {
        "id": "items",
        "kind": "lines",
        "title": title,
        "x": "items",
        "y": unit or metric_title(name).lower(),
        "series": series,
        "summary": "; ".join(f"{s['name']} {digits(s['points'][-1][1])} {unit}".strip() for s in series)
        + " after the last item.",
        "table": {
            "head": ["Lane", "Items", "Latest", "Lowest", "Highest"],
            "rows": [
                [s["name"], f"{len(s['points'])}", *(digits(f([y for _, y in s["points"]])) for f in (lambda v: v[-1], min, max))]
                for s in series
            ],
        },
    }


def _running(race: Race, name: str, samples: dict[tuple[str, int], float]) -> list[tuple[float, float]]:
    """Values in the order taken; a share is shown as its mean so far, since single items are 0 or 1."""
    values = list(samples.values())
    if name == "accuracy":
        values = [sum(values[: i + 1]) / (i + 1) for i in range(len(values))]
    return [(i + 1, round(v, 5)) for i, v in enumerate(values)]


def ratios(race: Race) -> Chart | None:
    """Ratios to the reference with their intervals, on a logarithmic axis."""
    rows, table_rows = [], []
    draws = drawing(race)
    for name in RATIO_METRICS:
        if draws and name == "end_to_end_s":  # the same as the image speed
            continue
        entries = [
            (i, lane.ratios[name]) for i, lane in enumerate(race.lanes) if name in lane.ratios and lane.ratios[name].value > 0
        ]
        entries = [(i, r) for i, r in entries if race.spec is None or i != race.spec.reference]
        if not entries:
            continue
        way = METRICS[name].better if name in METRICS else "neither"
        rows.append(
            {
                "title": metric_title(name),
                "better": {"higher": "right is better", "lower": "left is better"}.get(way, ""),
                "marks": [
                    {
                        "lane": i,
                        "name": name_of(race, i),
                        "letter": lane_letter(i),
                        "mark": lane_mark(i),
                        "colour": lane_colour(i),
                        "value": r.value,
                        "low": r.low,
                        "high": r.high,
                        "text": ratio_text(r.value),
                    }
                    for i, r in entries
                ],
            }
        )
        table_rows += [
            [
                metric_title(name),
                name_of(race, i),
                ratio_text(r.value),
                interval_text(r.low, r.high) or "–",
                f"{r.n}" if r.n else "–",
                verdict(name, r) or "–",
            ]
            for i, r in entries
        ]
    if not rows:
        return None
    return {
        "id": "ratios",
        "kind": "ratios",
        "title": f"Ratio to {name_of(race, race.spec.reference if race.spec else 0).lower()}",
        "x": "ratio, logarithmic; bars are 95 % intervals",
        "y": "",
        "rows": rows,
        "summary": _ratio_summary(race),
        "table": {"head": ["Metric", "Lane", "Ratio", "95 % interval", "n", "Verdict"], "rows": table_rows},
    }


def _ratio_summary(race: Race) -> str:
    parts: list[str] = []
    for name, word in (
        ("decode_tokens_per_s", "decode speed"),
        ("score_tokens_per_s", "scoring speed"),
        ("images_per_s", "image speed"),
        ("weight_bytes", "weights"),
        ("kv_bytes", "KV cache"),
    ):
        for i, lane in enumerate(race.lanes):
            if name in lane.ratios and lane.ratios[name].value != 1.0 and len(parts) < 3:
                parts.append(f"{name_of(race, i)}: {word} {ratio_text(lane.ratios[name].value)}")
    return ("; ".join(parts) or "No ratio differs from 1 so far") + "."
