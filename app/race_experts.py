"""What the screen shows of experts: how they shared the tokens of an item, layer by layer and lane by lane. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from app.components.lanes import lane_colour, lane_letter, lane_mark
from app.components.numbers import digits
from app.race import Race
from app.race_drawn import place_of
from app.race_names import name_of
from studio_state.events import ExpertLoad

Section = dict[str, Any]

BULK = 0.9  # share of the tokens by which layers are compared
SCALE = 10_000  # shares leave here as whole numbers


def experts(race: Race, item_id: str | None) -> Section:
    """The load of one item's experts: the chosen one's, else the current one's, else the latest that is told."""
    item = race.item_with(item_id, lambda i: i.experts)
    if item is None:
        return {"item": None, "lanes": []}
    lanes = [_lane(race, lane, item.experts[lane]) for lane in sorted(item.experts)]
    most = max((share for lane in lanes for layer in lane["layers"] for share in layer["shares"]), default=0)
    return {"item": item.id, "place": place_of(item), "most": most, "scale": SCALE, "lanes": [x for x in lanes if x["layers"]]}


def _lane(race: Race, lane: int, load: ExpertLoad) -> Section:
    layers = [
        {
            "layer": n + 1,
            "shares": [round(SCALE * share) for share in shares],
            "carry": carry(shares),
            "text": in_words(n, shares),
        }
        for n, shares in enumerate(load.layers)
        if shares
    ]
    return {
        "lane": lane,
        "name": name_of(race, lane),
        "letter": lane_letter(lane),
        "mark": lane_mark(lane),
        "colour": lane_colour(lane),
        "layers": layers,
        "summary": summary(load.layers),
    }


def carry(shares: Sequence[float]) -> int:
    """The fewest experts that carry nine tenths of a layer's tokens; 0 where there are no tokens."""
    total, sofar = sum(shares), 0.0
    for n, share in enumerate(sorted(shares, reverse=True)):
        if total <= 0:
            return 0
        sofar += share
        if sofar >= BULK * total - 1e-9:
            return n + 1
    return 0


def in_words(index: int, shares: Sequence[float]) -> str:
    """``layer 3: 5 of 8 experts carry 90 % of the tokens``."""
    return f"layer {index + 1}: {carry(shares)} of {len(shares)} experts carry {100 * BULK:.0f} % of the tokens"


def summary(layers: Sequence[Sequence[float]]) -> str:
    """A lane in one or two sentences: the usual layer, the least even one, and experts without a token."""
    having = [(n, shares) for n, shares in enumerate(layers) if any(shares)]
    if not having:
        return "No token visited an expert."
    least, shares = min(having, key=lambda x: (carry(x[1]) / len(x[1]), x[0]))
    words = in_words(least, shares)
    text = f"{words[:1].upper()}{words[1:]}."
    if len(having) > 1:
        mean = fmean(carry(s) for _, s in having)
        sizes = sorted({len(s) for _, s in having})
        of = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        text = (
            f"On average {digits(mean)} of {of} experts carry {100 * BULK:.0f} % of a layer's tokens; the least even is {words}."
        )
    idle = sum(share == 0 for _, s in having for share in s)
    total = sum(len(s) for _, s in having)
    return text + (f" {idle:,} of {total:,} experts, counted layer by layer, got no token." if idle else "")
