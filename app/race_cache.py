"""What the screen shows of a cache under the microscope: which head of which layer holds which position, over time. Pure."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.components.lanes import lane_colour, lane_letter, lane_mark
from app.race import Race
from app.race_drawn import place_of
from app.race_names import name_of
from app.race_parts import Item
from studio_state.events import CacheFrame, CacheMap

Section = dict[str, Any]


def cache(race: Race, item_id: str | None) -> Section:
    """The caches of one item: the chosen one's, else the current one's, else the latest that is told."""
    item = race.item_with(item_id, lambda i: i.caches)
    if item is None:
        return {"item": None, "lanes": []}
    some = next(iter(item.caches.values()))
    return {
        "item": item.id,
        "place": place_of(item),
        "pieces": item.pieces,
        "marked": some.marked,
        "image": some.image,
        "lanes": [_lane(race, item, lane) for lane in sorted(item.caches)],
    }


def _lane(race: Race, item: Item, lane: int) -> Section:
    told = item.caches[lane]
    stream = item.streams.get(lane)
    return {
        "lane": lane,
        "name": name_of(race, lane),
        "letter": lane_letter(lane),
        "mark": lane_mark(lane),
        "colour": lane_colour(lane),
        "heads": told.heads,
        "frames": [f.model_dump() | {"when": when(f), "needle": needle(told, f)} for f in told.frames],
        "summary": summary(told, item.pieces, None if stream is None or stream.outcome is None else stream.outcome.correct),
    }


def when(frame: CacheFrame) -> str:
    """A moment in words."""
    return "after the prompt" if frame.after <= 1 else f"after {frame.after:,} new tokens"


def bits(frame: CacheFrame, heads: int) -> NDArray[np.bool_]:
    """Which head holds which position [heads of all layers, positions]."""
    packed = np.frombuffer(base64.b64decode(frame.held), dtype=np.uint8).reshape(heads, -1)
    return np.unpackbits(packed, axis=1)[:, : frame.positions].astype(bool)


def needle(told: CacheMap, frame: CacheFrame) -> Section | None:
    """What became of the needle by this moment, in words, and whether some of it is gone from every head; None without one."""
    if not told.marked:
        return None
    first, stop = told.marked
    held = bits(frame, sum(told.heads))[:, first:stop]
    gone, whole = int((~held.any(0)).sum()), int(held.all(1).sum())
    text = f"{whole:,} of {len(held):,} heads hold all of it, " + (
        f"{gone:,} of its {stop - first:,} tokens {'is' if gone == 1 else 'are'} gone from every head"
        if gone
        else "no token of it is gone from every head"
    )
    return {"text": f"{'Needle lost' if gone else 'Needle'} {when(frame)}: {text}.", "lost": bool(gone), "words": text}


def summary(told: CacheMap, pieces: Sequence[str], correct: bool | None) -> str:
    """What is left at the end, which needle there was, and what became of it.

    Args:
        pieces: texts of the prompt's tokens; empty where they are not known.
    """
    last = told.frames[-1]
    held = bits(last, sum(told.heads))
    text = f"{when(last)[:1].upper()}{when(last)[1:]} the heads hold {100 * held.mean():.0f} % of {last.positions:,} positions"
    empty = int((~held.any(0)).sum())
    text += f"; {empty:,} of them no head holds any more." if empty else "."
    at = [needle(told, f) for f in told.frames]
    end = at[-1]
    if end is None:
        return text
    first, stop = told.marked
    named = "".join(pieces[first:stop]).strip(" .")
    text += f" The needle{f', “{named}”,' if named else ''} is tokens {first + 1:,} to {stop:,}: {end['words']}"
    if end["lost"] and len(at) > 1:
        text += f", first {next(when(f) for f, n in zip(told.frames, at, strict=True) if n and n['lost'])}"
    return text + ("." if correct is None else f"; the answer is {'right' if correct else 'wrong'}.")
