"""What the screen shows of pictures that lanes draw: how far they are, what the judge sees, how far from the baseline's. Pure.

The pictures themselves leave through :func:`app.race_gallery.gallery`, once each; what is here names them by item and lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from app.components.lanes import lane_colour, lane_letter, lane_mark
from app.components.numbers import metric_quantity
from app.race import Race
from app.race_names import name_of
from app.race_parts import Item, Stream
from studio_state.events import Output

Section = dict[str, Any]


def drawing(race: Race) -> bool:
    """True if the lanes of this race draw pictures."""
    return race.model is not None and race.model.family == "diffusion"


def place_of(item: Item) -> str:
    """``item 3 of 20``."""
    return f"item {item.index + 1}" + (f" of {item.of}" if item.of else "")


def compared(race: Race, item_id: str | None) -> Item | None:
    """The item whose pictures lie side by side: the chosen one, else the latest that every lane at work has drawn.

    While there is none of these, the latest of those that most lanes have drawn.
    """
    if item_id is not None:
        return race.items.get(item_id)
    best, most = None, 0
    able = sum(lane.status not in ("refused", "unavailable", "failed") for lane in race.lanes)
    for item in reversed(race.items.values()):
        done = sum(s.outcome is not None for s in item.streams.values())
        if done > most:
            best, most = item, done
        if done >= able > 0:
            break
    return best


def drawn(race: Race, item_id: str | None) -> Section:
    """The pictures of one item, lane by lane; ``item`` is None where nothing is to be shown."""
    item = compared(race, item_id) if drawing(race) else None
    if item is None:
        return {"item": None, "lanes": []}
    lanes = [
        {
            "lane": lane,
            "name": name_of(race, lane),
            "letter": lane_letter(lane),
            "mark": lane_mark(lane),
            "colour": lane_colour(lane),
            **told(race, lane, item),
        }
        for lane in range(len(race.lanes))
    ]
    return {"item": item.id, "place": place_of(item), "asked": race.prompts.get(item.id, ""), "lanes": lanes}


def told(race: Race, lane: int, item: Item | None) -> Section:
    """What is known of a lane's picture of an item.

    Returns:
        ``state``: ``waiting``, ``drawing``, ``stopped`` or ``done``; ``text``: the same in words, or what the judge sees;
        ``trace``: see :func:`trace`.
    """
    stream = item.streams.get(lane) if item else None
    if item is None or stream is None:
        return {"state": "waiting", "text": "not begun", "done": 0.0}
    if stream.outcome is not None:
        away = distance(race, lane, item)
        return {
            "state": "done",
            "done": 1.0,
            "text": sight(stream.outcome),
            "correct": stream.outcome.correct,
            "expected": stream.outcome.expected,
            "distance": away["words"],
            "trace": trace(stream.outcome.data.get("reused")),
        }
    return _unfinished(stream, race.lanes[lane].status == "running" and not race.over)


def _unfinished(stream: Stream, goes_on: bool) -> Section:
    seen = stream.preview
    where = f"step {seen.step} of {seen.of}" if seen else ""
    share = seen.step / seen.of if seen and seen.of else 0.0
    if goes_on:
        return {"state": "drawing", "text": where or "beginning", "done": share}
    return {"state": "stopped", "text": f"stopped at {where}" if where else "not drawn", "done": share}


def sight(outcome: Output) -> str:
    """What the judge sees in a picture, with its likelihood; empty where there is no judge."""
    if not outcome.text:
        return ""
    shares = outcome.data.get("probabilities")
    share = shares[0] if isinstance(shares, list) and shares and isinstance(shares[0], int | float) else None
    return f"sees {outcome.text}" + (f" ({100 * share:.0f} %)" if share is not None else "")


def distance(race: Race, lane: int, item: Item) -> Section:
    """How far a picture is from the baseline's of the same seed.

    Returns:
        ``psnr`` and ``ssim`` as text, empty while they are not known; ``equal``; ``words``: all of it in one line;
        ``rank``: SSIM as a number, by which pictures are put in order; None while not known.
    """
    samples = race.lanes[lane].samples
    psnr, ssim, same = (samples.get(name, {}).get((item.id, 0)) for name in ("psnr", "ssim", "same_output"))
    if lane == 0:
        return {"psnr": "", "ssim": "", "equal": False, "words": "", "rank": None}
    texts = {"psnr": _text("psnr", psnr), "ssim": _text("ssim", ssim), "equal": same == 1.0, "rank": ssim}
    if same == 1.0:
        return {**texts, "words": "equal to the baseline's"}
    return {**texts, "words": ", ".join(f"{n.upper()} {texts[n]}" for n in ("psnr", "ssim") if texts[n])}


def _text(name: str, value: float | None) -> str:
    return "" if value is None else str(metric_quantity(name, value))


def trace(reused: Any) -> Section | None:
    """Which denoising steps took work from earlier ones; None where none did.

    Args:
        reused: per step the share of its work, from 0 to 1, as the record holds it.

    Returns:
        ``shares``; ``text``: how many steps reused work; ``words``: every step, runs of equal ones together.
    """
    if not isinstance(reused, list) or not all(isinstance(x, int | float) for x in reused):
        return None
    shares = [min(1.0, max(0.0, float(x))) for x in reused]
    some = [s for s in shares if s > 0]
    if not some:
        return None
    text = f"{len(some)} of {len(shares)} steps reused work"
    if low_to_high := _range(some):
        text += f", {low_to_high} of it"
    return {"shares": [round(s, 3) for s in shares], "text": text, "words": _runs(shares)}


def _range(shares: Sequence[float]) -> str:
    low, high = (f"{100 * f(shares):.0f}" for f in (min, max))
    return "" if low == "100" else f"{low} %" if low == high else f"{low} to {high} %"


def _runs(shares: Sequence[float]) -> str:
    """``step 1 computed, steps 2 to 4 reused 90 %``."""
    parts, at = [], 1
    for share, run in groupby(shares):
        n = len(list(run))
        where = f"step {at}" if n == 1 else f"steps {at} to {at + n - 1}"
        parts.append(f"{where} {f'reused {100 * share:.0f} %' if share else 'computed'}")
        at += n
    return ", ".join(parts)
