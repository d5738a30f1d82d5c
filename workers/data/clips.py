"""Short clips of the synthetic world: most of a clip is the same in every frame, and what is asked about passes by.

A clip is a few scenes on one grid. Some objects stay; others are in one or two frames only, each in a cell of
its own. No two objects of a clip have the same name. Questions are about those that pass by, so that an answer
needs the right frame and, in it, the right corner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from PIL import Image

from workers.data.pictures import side_by_side
from workers.data.scenes import GRID, HELD_OUT_SEED, NAMES, Scene, Thing, spot

FRAMES = 8
STAYING, PASSING = 2, 3  # objects of a clip
LONGEST = 2  # frames that a passing object is in
SIZE = 96

ClipKind = Literal["colour-of", "shape-of", "exists"]
CLIP_KINDS: tuple[ClipKind, ...] = get_args(ClipKind)


@dataclass(frozen=True)
class Visit:
    """An object and the frames that it is in: ``first`` to the one before ``end``."""

    thing: Thing
    first: int
    end: int

    def is_in(self, frame: int) -> bool:
        """Whether the object is in a frame."""
        return self.first <= frame < self.end


@dataclass(frozen=True)
class Clip:
    """Some objects over a few frames, on a plain ground of one grey value."""

    visits: tuple[Visit, ...]
    length: int
    ground: int

    @cached_property
    def frames(self) -> tuple[Scene, ...]:
        """One scene a frame."""
        return tuple(Scene(tuple(v.thing for v in self.visits if v.is_in(f)), SIZE, self.ground) for f in range(self.length))

    @property
    def passing(self) -> tuple[Visit, ...]:
        """Objects that are not in every frame."""
        return tuple(v for v in self.visits if v.end - v.first < self.length)


@dataclass(frozen=True)
class ClipQuestion:
    """A question about a clip and its one right answer.

    Attributes:
        words: what it names: a shape, a colour, or both.
        visit: the object that it is about; None where nothing in the clip has that name.
    """

    kind: ClipKind
    text: str
    answer: str
    words: tuple[str, ...]
    visit: Visit | None = None


@dataclass(frozen=True)
class ClipPicture:
    """The frames of a clip, drawn anew whenever they are opened."""

    clip: Clip

    def frames(self) -> list[Image.Image]:
        """The frames [96, 96] in RGB, in the order of time."""
        return [Scene(s.things, s.size, s.ground).image for s in self.clip.frames]

    def open(self) -> Image.Image:
        """All frames in one picture, in reading order."""
        return side_by_side(self.frames())


def make_clip(rng: np.random.Generator, frames: int = FRAMES) -> Clip:
    """A clip in which one passing object at least is the only one of its shape, and one the only one of its colour."""
    while True:
        names = rng.permutation(len(NAMES))[: STAYING + PASSING]
        cells = rng.permutation(GRID * GRID)[: STAYING + PASSING]
        visits = []
        for n, (name, cell) in enumerate(zip(names, cells, strict=True)):
            colour, shape = NAMES[name].split()
            at, radius = spot(rng, place := divmod(int(cell), GRID), SIZE)
            thing = Thing(shape, colour, place, at, radius)
            first = 0 if n < STAYING else int(rng.integers(frames))
            end = frames if n < STAYING else min(frames, first + int(rng.integers(1, LONGEST + 1)))
            visits.append(Visit(thing, first, end))
        clip = Clip(tuple(visits), frames, int(rng.integers(225, 256)))
        if all(alone(clip, clip.passing, attribute) for attribute in ("shape", "colour")):
            return clip


def alone(clip: Clip, among: Sequence[Visit], attribute: str) -> list[Visit]:
    """Those of some objects that share their shape (colour) with no other object of the clip."""
    counts = Counter(getattr(v.thing, attribute) for v in clip.visits)
    return [v for v in among if counts[getattr(v.thing, attribute)] == 1]


def ask_clip(clip: Clip, kind: ClipKind, rng: np.random.Generator, among: Sequence[Visit]) -> ClipQuestion | None:
    """A question about one of some objects of a clip; None if none of them can be asked about so.

    ``exists`` asks with equal chances for one of them, and for a name that nothing in the clip has.
    """
    if kind == "exists" and rng.random() < 0.5:
        there = {v.thing.name for v in clip.visits}
        name = str(rng.choice([n for n in NAMES if n not in there]))
        return ClipQuestion(kind, f"is there a {name} ?", "no", tuple(name.split()))
    named = "shape" if kind == "colour-of" else "colour"
    fitting = list(among) if kind == "exists" else alone(clip, among, named)
    if not fitting:
        return None
    visit = fitting[rng.integers(len(fitting))]
    thing = visit.thing
    if kind == "exists":
        return ClipQuestion(kind, f"is there a {thing.name} ?", "yes", (thing.colour, thing.shape), visit)
    if kind == "colour-of":
        return ClipQuestion(kind, f"what color is the {thing.shape} ?", thing.colour, (thing.shape,), visit)
    return ClipQuestion(kind, f"what shape is {thing.colour} ?", thing.shape, (thing.colour,), visit)


def held_out_clip(seed: int, n: int, frames: int = FRAMES) -> tuple[Clip, list[ClipQuestion]]:
    """Clip ``n`` of those that no training draws, and one question of each kind about an object that passes by."""
    rng = np.random.default_rng([HELD_OUT_SEED, frames, seed, n])
    clip = make_clip(rng, frames)
    asked = [ask_clip(clip, kind, rng, clip.passing) for kind in CLIP_KINDS]
    return clip, [q for q in asked if q is not None]


def shows(scene: Scene, words: Sequence[str]) -> bool:
    """Whether one object of a scene has all these words in its name."""
    return any(set(words) <= {t.shape, t.colour} for t in scene.things)
