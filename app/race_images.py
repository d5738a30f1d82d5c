"""What the screen shows of images: the tokens that lanes work on, over the picture. Pure.

The pictures themselves leave through :func:`app.race_gallery.gallery`, once each; everything here names an item by its id.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from app.components.lanes import lane_colour, lane_letter, lane_mark
from app.race import Race
from app.race_names import name_of
from app.race_parts import Item
from studio_state.events import ImageTokens, Output, Picture

Section = dict[str, Any]

MIMES = ("image/jpeg", "image/png", "image/webp", "image/gif")
KEPT = 0.9995  # shares are told in four digits
_MARK = re.compile(r"<[^<>\s]{1,40}>|\[/?INST\]")
_ASKED = re.compile(r"(?:^|[\0\n])\s*(?:user|human)\s*[:\0\n]", re.IGNORECASE)
_ANSWERS = re.compile(r"(?:^|[\0\s])assistant\s*:?[\0\s]*$", re.IGNORECASE)


def source(mime: str, data: str) -> str:
    """A data URL; empty for anything that is not one of the plain image formats."""
    return f"data:{mime};base64,{data}" if mime in MIMES and data else ""


def made_picture(outcome: Output | None) -> str:
    """The map or picture that an item ended in, a base64 PNG; empty where it ended in none."""
    found = outcome.data.get("image") if outcome and outcome.kind == "image" else None
    return found if isinstance(found, str) else ""


def saliency(outcome: Output | None) -> str:
    """The map that an item ended in, as a data URL; empty where it ended in none."""
    return source("image/png", made_picture(outcome))


def bars(outcome: Output) -> list[Section]:
    """The likeliest classes of an item, as bars; empty where it did not end in a class."""
    labels, shares = outcome.data.get("labels"), outcome.data.get("probabilities")
    if outcome.kind != "label" or not isinstance(labels, list) or not isinstance(shares, list):
        return []
    return [
        {
            "label": str(label),
            "share": min(1.0, max(0.0, float(share))),
            "text": _percent(float(share), 1),
            "expected": outcome.expected is not None and str(label).strip().casefold() == outcome.expected.strip().casefold(),
        }
        for label, share in zip(labels, shares, strict=False)
        if isinstance(share, int | float)
    ]


def question(prompt: str) -> str:
    """What is asked, without the chat template's words and marks around it."""
    text = _ANSWERS.sub("", _MARK.sub("\0", prompt))
    turns = list(_ASKED.finditer(text))
    text = text[turns[-1].end() :] if turns else text
    return re.sub(r"[\0 ]+", " ", text).strip() or prompt.strip()


def pictured(race: Race, item_id: str | None) -> Item | None:
    """The item whose picture is shown: the chosen one, else the current one, if it has a picture.

    The picture before stays until anything came of the current item, so that nothing jumps between two of them.
    """
    item = race.items.get(item_id or race.current or "")
    if item is None or item.picture is not None:
        return item
    begun = any(s.at or s.outcome for s in item.streams.values())
    before = [] if item_id is not None or begun else [i for i in race.items.values() if i.picture is not None]
    return before[-1] if before else None


def images(race: Race, item_id: str | None) -> Section:
    """The picture of one item: what is asked about it, where its tokens lie, and what each lane did with them."""
    item = pictured(race, item_id)
    if item is None or item.picture is None:
        return {"item": None, "lanes": []}
    picture = item.picture
    views = _views(picture)
    return {
        "item": item.id,
        "place": f"item {item.index + 1}" + (f" of {item.of}" if item.of else ""),
        "question": question(race.prompts.get(item.id, "")),
        "width": max(1, picture.width),
        "height": max(1, picture.height),
        "boxes": [box if len(box) == 4 else [] for box in picture.boxes],
        "views": views,
        "tokens": bool(item.image_tokens),
        "maps": any(saliency(s.outcome) for s in item.streams.values()),
        "lanes": [_panel(race, item, lane, views) for lane in range(len(race.lanes))],
    }


def _views(picture: Picture) -> list[int]:
    """The view of every token; the whole image where that is not told."""
    return picture.views if len(picture.views) == len(picture.boxes) else [0] * len(picture.boxes)


def _panel(race: Race, item: Item, lane: int, views: Sequence[int]) -> Section:
    stream, tokens = item.streams.get(lane), item.image_tokens.get(lane)
    done = stream is not None and stream.outcome is not None
    waits = "" if done and not item.image_tokens else "nothing told of its image tokens" if done else "not there yet"
    return {
        "lane": lane,
        "name": name_of(race, lane),
        "letter": lane_letter(lane),
        "mark": lane_mark(lane),
        "colour": lane_colour(lane),
        "share": [round(s, 3) for s in tokens.share] if tokens else [],
        "level": tokens.level if tokens else [],
        "group": tokens.group if tokens else [],
        "own": own_keep(tokens) if tokens else None,
        "caption": caption(tokens, views) if tokens else waits,
        "saliency": saliency(stream.outcome if stream else None),
    }


def own_keep(tokens: ImageTokens) -> float | None:
    """The ``keep`` that the lane ran with, as far as its tokens show: the highest level among those that it kept."""
    if not tokens.level:
        return None
    kept = [level for level, share in zip(tokens.level, tokens.share, strict=False) if share >= KEPT and level <= 1]
    return max(kept, default=1.0)


def caption(tokens: ImageTokens, views: Sequence[int] = ()) -> str:
    """What a lane did with the image tokens, in one line."""
    groups = [g for g in tokens.group if g >= 0]
    if len(set(groups)) < len(groups):
        gone = sum(g < 0 and s < KEPT for g, s in zip(tokens.group, tokens.share, strict=False))  # the rest: line breaks
        return f"{len(groups):,} tokens merged into {len(set(groups)):,}" + (f", {gone:,} dropped" if gone else "")
    total, kept = len(tokens.share), [s >= KEPT for s in tokens.share]
    text = f"{sum(kept):,} of {total:,} image tokens kept"
    partly = sorted({s for s in tokens.share if 0 < s < KEPT})
    if partly:
        few = sum(0 < s < KEPT for s in tokens.share)
        when = f"after {_percent(partly[0])}" if len(partly) == 1 else f"after {_percent(partly[0])} to {_percent(partly[-1])}"
        text += f", {few:,} dropped {when} of the layers"
    if len(views) == total and any(views) and not all(views):
        whole = [k for k, v in zip(kept, views, strict=True) if v == 0]
        tiles = [k for k, v in zip(kept, views, strict=True) if v]
        text += f" (whole image {sum(whole):,} of {len(whole):,}, tiles {sum(tiles):,} of {len(tiles):,})"
    return text


def _percent(share: float, places: int = 0) -> str:
    return f"{100 * share:.{places}f} %"
