"""The colour, mark and letter of every lane: the same in each chart, table and text.

Colours after Okabe and Ito (2008), "Color universal design"; the baseline takes the ink of the
page. Marks repeat what the colours say, for people who do not see them.
"""

from __future__ import annotations

LANE_COLOURS: tuple[str, ...] = (
    "var(--ps-ink)",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#B5A800",
)
LANE_MARKS: tuple[str, ...] = ("●", "■", "▲", "◆", "▼", "★", "⬟", "✚")
MAX_OWN_LANES = 4


def lane_colour(lane: int) -> str:
    """CSS colour of a lane; lane 0 is the baseline. Colours repeat after eight lanes."""
    return LANE_COLOURS[lane % len(LANE_COLOURS)]


def lane_mark(lane: int) -> str:
    """Mark drawn beside a lane's name and on its points."""
    return LANE_MARKS[lane % len(LANE_MARKS)]


def lane_letter(lane: int) -> str:
    """``A`` for the first lane after the baseline."""
    return "" if lane == 0 else chr(ord("A") + (lane - 1) % 26)


def lane_name(lane: int, name: str, text: str) -> str:
    """What a lane is called: its own name, else its one-line pipeline."""
    return "Baseline" if lane == 0 and text == "baseline" else (name or text)
