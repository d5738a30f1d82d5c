"""Constructed recordings of caches under the microscope, whose content is known: as spools that a studio opens.

``NEEDLE``: five heads in layers of 2, 1 and 2, twenty prompt tokens, the needle in tokens 9 and 10. Lane 1 loses the second
of them while it answers and then both; in lane 2 three heads hold both to the end. ``SEEN``: item 0 is dark with a bright
square in its top right quarter, on 12 x 12 patches: one head holds all of them, the other one that quarter; item 1 has a whole
view, of which nothing is left, and tiles, of which all is. ``LONG``: ninety heads, two thousand positions, every 40th is held.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from studio_state import events as ev
from tests.ui import pictured
from tests.ui.pictured import QUARTER, SIDE, TOKENS

NEEDLE, SEEN, LONG = (f"20260106-10000{i}-{i:06x}" for i in range(1, 4))
WORDS = ["The", "old", "keeper", "wrote", "that", "the", "number", "is", "47", "11", ".", "What", "is", "the", "secret"]
WORDS += ["number", "for", "Lisbon", "now", "?"]
HEADS = [2, 1, 2]
MARKED = [8, 10]
FIRST = 4  # place of the first image token
Held = Sequence[Sequence[int]]  # a row a head: the positions that it holds


def frame(after: int, positions: int, held: Held) -> ev.CacheFrame:
    """One moment."""
    bits = np.zeros((len(held), positions), dtype=bool)
    for row, places in enumerate(held):
        bits[row, list(places)] = True
    return ev.CacheFrame(after=after, positions=positions, held=base64.b64encode(np.packbits(bits, axis=1).tobytes()).decode())


def losing() -> list[ev.CacheFrame]:
    """All heads hold the ends; of the needle fewer and fewer."""
    ends = [0, 1, *range(16, 20)]
    return [
        frame(1, 20, [[*ends, 8, 9], [*ends, 8], [*ends, 8], ends, [*ends, 5, 6]]),
        frame(4, 23, [[*ends, 8, *range(20, 23)], *[[*ends, *range(20, 23)]] * 4]),
        frame(8, 27, [[*ends, *range(20, 27)]] * 5),
    ]


def keeping() -> list[ev.CacheFrame]:
    """Three heads hold all of the needle."""
    return [
        frame(after, n, [[0, 8, 9, *range(15, n)]] * 3 + [[0, *range(15, n)]] * 2) for after, n in ((1, 20), (4, 23), (8, 27))
    ]


def begin(workload: str, *lanes: tuple[str, str, dict[str, float]]) -> Iterator[ev.Event]:
    yield ev.Submitted(spec=pictured.spec(workload, *lanes))
    yield ev.Started()
    for lane, name in enumerate(("baseline", *(policy for _, policy, _ in lanes))):
        yield ev.LaneStarted(lane=lane, order=name)


def needle() -> Iterator[ev.Event]:
    """One question, three lanes."""
    yield from begin("needle", ("Half the cache", "snapkv", {"keep": 0.5}), ("Heavy hitters", "h2o", {"keep": 0.6}))
    for lane, said in enumerate(("4711", "1234", "4711")):
        pieces = [f"{w} " for w in WORDS] if lane == 0 else []
        yield ev.ItemStarted(lane=lane, item="a", index=0, of=1, prompt=" ".join(WORDS), pieces=pieces)
        yield from pictured.answer(lane, "a", said, "4711")
        if lane:
            frames = losing() if lane == 1 else keeping()
            yield ev.CacheMap(lane=lane, item="a", heads=HEADS, frames=frames, marked=MARKED)
    yield from pictured.ends(3)


def seen() -> Iterator[ev.Event]:
    """Two questions about images, two lanes."""
    yield from begin("vqa", ("A quarter of the cache", "look-m", {"keep": 0.5}))
    yield pictured.picture("square", pictured.square(), pictured.grid(SIDE, SIDE))
    quarter = [FIRST + i for i in QUARTER]
    for lane in range(2):
        yield ev.ItemStarted(lane=lane, item="square", index=0, of=2, prompt=pictured.PROMPT if lane == 0 else "")
        yield from pictured.answer(lane, "square", "top right", "top right")
        yield ev.ImageTokens(lane=lane, item="square", share=[1.0] * TOKENS)
    places, length = list(range(FIRST, FIRST + TOKENS)), FIRST + TOKENS + 6
    frames = [
        frame(after, n, [list(range(n)), [0, 1, *quarter, *range(length - 6, n)]]) for after, n in ((1, length), (6, length + 5))
    ]
    yield ev.CacheMap(lane=1, item="square", heads=[1, 1], frames=frames, image=places)
    tiles = [b for y in (0, 5000) for x in (0, 5000) for b in pictured.grid(4, 4, (x, y, x + 5000, y + 5000))]
    views = [0] * 16 + [1 + i // 16 for i in range(64)] + [4]
    yield pictured.picture("tiles", pictured.square(480, 300), [*pictured.grid(4, 4), *tiles, []], views)
    for lane in range(2):
        yield ev.ItemStarted(lane=lane, item="tiles", index=1, of=2, prompt=pictured.PROMPT if lane == 0 else "")
        yield from pictured.answer(lane, "tiles", "right", "right")
    places, length = list(range(FIRST, FIRST + 81)), FIRST + 81 + 6
    rest = [0, *range(FIRST + 16, length)]
    yield ev.CacheMap(lane=1, item="tiles", heads=[1, 1], frames=[frame(1, length, [rest, rest])], image=places)
    yield from pictured.ends(2)


def long() -> Iterator[ev.Event]:
    """A model of thirty layers and a long prompt."""
    yield from begin("prompts", ("A fortieth", "snapkv", {"keep": 0.05}))
    for lane in range(2):
        yield ev.ItemStarted(lane=lane, item="a", index=0, of=1, prompt="Hello", pieces=["Hello "] * 2000 if lane == 0 else [])
        yield from pictured.answer(lane, "a", "top right", "top right")
    yield ev.CacheMap(lane=1, item="a", heads=[3] * 30, frames=[frame(1, 2000, [list(range(0, 2000, 40))] * 90)])
    yield from pictured.ends(2)


def record_all(folder: Path) -> None:
    """All of them."""
    for experiment, events in ((NEEDLE, needle()), (SEEN, seen()), (LONG, long())):
        pictured.record(folder, experiment, events)
