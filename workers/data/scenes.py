"""A synthetic world for vision-language models: scenes whose every answer is known exactly.

A scene is a 3 x 3 grid of cells; each holds at most one object, a shape in a colour. From it come
the image, a mask of each object, a caption, a class, and questions of six kinds. Everything is a
function of the random generator, so that a seed names a scene.

Shapes: images [H, W, 3] bytes, masks [objects, H, W] bools.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

GRID = 3
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (222, 58, 52),
    "green": (64, 170, 78),
    "blue": (58, 104, 222),
    "yellow": (240, 200, 48),
    "purple": (150, 70, 190),
}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
RELATIONS = ("left of", "right of", "above", "below")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
NOTHING = "nothing"
RADIUS = (9.0, 14.0)  # smallest and largest half extent of an object in pixels
HELD_OUT_SEED = 20_250_101  # no training seed draws these scenes

QuestionKind = Literal["count", "colour-at", "shape-at", "count-of-shape", "exists", "relation"]
KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)


@dataclass(frozen=True)
class Thing:
    """One object.

    Attributes:
        cell: (row, column) in the grid.
        at: centre (x, y); radius: half its extent; both in pixels.
    """

    shape: str
    colour: str
    cell: tuple[int, int]
    at: tuple[float, float]
    radius: float

    @property
    def name(self) -> str:
        """``red circle``."""
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """``top left``."""
        return place(self.cell)


@dataclass(frozen=True)
class Question:
    """A question about a scene, and its one right answer."""

    kind: QuestionKind
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """A grid of objects on a plain ground.

    Attributes:
        size: edge of the square image in pixels.
        ground: grey value of the background.
    """

    things: tuple[Thing, ...]
    size: int
    ground: int

    @cached_property
    def image(self) -> Image.Image:
        """The picture [size, size] in RGB."""
        picture = Image.new("RGB", (self.size, self.size), (self.ground,) * 3)
        pen = ImageDraw.Draw(picture)
        for thing in self.things:
            draw(pen, thing, COLOURS[thing.colour])
        return picture

    @cached_property
    def masks(self) -> NDArray[np.bool_]:
        """Where each object is: [objects, size, size]."""
        layer = Image.new("L", (self.size, self.size), 0)
        pen = ImageDraw.Draw(layer)
        for i, thing in enumerate(self.things):
            draw(pen, thing, i + 1)
        masks: NDArray[np.bool_] = np.asarray(layer)[None] == np.arange(1, len(self.things) + 1)[:, None, None]
        return masks

    @property
    def caption(self) -> str:
        """All objects and their places, in reading order."""
        return ", ".join(f"a {t.name} at the {t.place}" for t in sorted(self.things, key=lambda t: t.cell)) or NOTHING

    @property
    def label(self) -> str:
        """The shape that occurs most often; of equals the one first in reading order."""
        counts = Counter(t.shape for t in sorted(self.things, key=lambda t: t.cell))
        return counts.most_common(1)[0][0] if counts else NOTHING

    def thing_at(self, cell: tuple[int, int]) -> Thing | None:
        """The object in a cell."""
        return next((t for t in self.things if t.cell == cell), None)


@dataclass(frozen=True)
class ScenePicture:
    """The image of a scene, drawn anew whenever it is opened: thousands of items hold no pixels."""

    scene: Scene

    def open(self) -> Image.Image:
        """The picture [size, size] in RGB."""
        return replace(self.scene).image


def place(cell: tuple[int, int]) -> str:
    """``top left`` for (0, 0)."""
    return f"{ROWS[cell[0]]} {COLUMNS[cell[1]]}"


def draw(pen: ImageDraw.ImageDraw, thing: Thing, ink: object) -> None:
    """Draw one object."""
    (x, y), r = thing.at, thing.radius
    box = [x - r, y - r, x + r, y + r]
    if thing.shape == "circle":
        pen.ellipse(box, fill=ink)  # type: ignore[arg-type]
    elif thing.shape == "square":
        pen.rectangle([x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r], fill=ink)  # type: ignore[arg-type]
    elif thing.shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=ink)  # type: ignore[arg-type]
    else:
        w = 0.33 * r
        pen.rectangle([x - r, y - w, x + r, y + w], fill=ink)  # type: ignore[arg-type]
        pen.rectangle([x - w, y - r, x + w, y + r], fill=ink)  # type: ignore[arg-type]


def make_scene(rng: np.random.Generator, size: int = 96, radius: tuple[float, float] = RADIUS) -> Scene:
    """A scene of two to six objects.

    Args:
        size: edge of the image in pixels; a cell is a third of it.
        radius: smallest and largest half extent of an object in pixels.
    """
    cells = rng.permutation(GRID * GRID)[: rng.integers(2, 7)]
    things = []
    for c in cells:
        cell = (int(c) // GRID, int(c) % GRID)
        at, r = spot(rng, cell, size, radius)
        shape, colour = SHAPES[rng.integers(len(SHAPES))], list(COLOURS)[rng.integers(len(COLOURS))]
        things.append(Thing(shape, colour, cell, at, r))
    return Scene(tuple(things), size, int(rng.integers(225, 256)))


def spot(
    rng: np.random.Generator, cell: tuple[int, int], size: int, radius: tuple[float, float] = RADIUS
) -> tuple[tuple[float, float], float]:
    """Centre (x, y) and half extent of an object in a cell, in pixels."""
    r = float(rng.uniform(*radius))
    free = size / GRID / 2 - r - 1
    row, column = cell
    x, y = ((k + 0.5) * size / GRID + float(rng.uniform(-free, free)) for k in (column, row))
    return (x, y), r


def held_out_scene(size: int, n: int) -> tuple[Scene, list[Question]]:
    """Scene ``n`` of those that no training draws, ``size`` pixels an edge, and one question of each kind, as in ``KINDS``."""
    rng = np.random.default_rng([HELD_OUT_SEED, size, n])
    scene = make_scene(rng, size)
    return scene, [ask(scene, kind, rng) for kind in KINDS]


def ask(scene: Scene, kind: QuestionKind, rng: np.random.Generator) -> Question:
    """A question of this kind; yes and no are equally likely where the scene allows it."""
    question = _ASKERS[kind](scene, rng)
    return Question(kind, *question)


def _count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return "how many objects are there ?", NUMBERS[len(scene.things)]


def _cell(scene: Scene, rng: np.random.Generator) -> tuple[int, int]:
    """Mostly a cell that holds something."""
    if rng.random() < 0.85:
        return scene.things[rng.integers(len(scene.things))].cell
    return int(rng.integers(GRID)), int(rng.integers(GRID))


def _colour_at(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    cell = _cell(scene, rng)
    thing = scene.thing_at(cell)
    return f"what color is at the {place(cell)} ?", thing.colour if thing else NOTHING


def _shape_at(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    cell = _cell(scene, rng)
    thing = scene.thing_at(cell)
    return f"what shape is at the {place(cell)} ?", thing.shape if thing else NOTHING


def _count_of_shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    there = {t.shape for t in scene.things}
    absent = [s for s in SHAPES if s not in there]
    of_absent = absent and rng.random() < 0.2
    shape = str(rng.choice(absent if of_absent else sorted(there)))
    return f"how many {PLURALS[shape]} are there ?", NUMBERS[sum(t.shape == shape for t in scene.things)]


def _exists(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    there = {t.name for t in scene.things}
    if rng.random() < 0.5:
        return f"is there a {rng.choice(sorted(there))} ?", "yes"
    return f"is there a {rng.choice([n for n in NAMES if n not in there])} ?", "no"


def _relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """About two objects that stand alone in their name; where there are none, about one that is not there (no)."""
    names = Counter(t.name for t in scene.things)
    alone = [t for t in scene.things if names[t.name] == 1]
    pairs = [
        (a, b, relation)
        for a in alone
        for b in alone
        if a is not b
        for relation in RELATIONS
        if holds(a, b, relation) is not None
    ]
    if not pairs:
        one = scene.things[0]
        other = str(rng.choice([n for n in NAMES if n not in names]))
        return f"is the {one.name} {rng.choice(RELATIONS)} the {other} ?", "no"
    wanted = bool(rng.random() < 0.5)  # to every pair that holds belongs the opposite that does not
    fitting = [p for p in pairs if holds(*p) is wanted]
    a, b, relation = fitting[rng.integers(len(fitting))]
    return f"is the {a.name} {relation} the {b.name} ?", "yes" if wanted else "no"


def holds(a: Thing, b: Thing, relation: str) -> bool | None:
    """Whether ``a`` stands so to ``b``, by cells; None where they share the row or column in question."""
    axis = 1 if relation in ("left of", "right of") else 0
    gap = a.cell[axis] - b.cell[axis]
    if gap == 0:
        return None
    return (gap < 0) == (relation in ("left of", "above"))


NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
_ASKERS = {
    "count": _count,
    "colour-at": _colour_at,
    "shape-at": _shape_at,
    "count-of-shape": _count_of_shape,
    "exists": _exists,
    "relation": _relation,
}
_FRAME = "how many objects are there ? what color shape is at the a of above below left right"
WORDS = tuple(
    dict.fromkeys(
        (*_FRAME.split(), *ROWS, *COLUMNS, *SHAPES, *PLURALS.values(), *COLOURS, *NUMBERS, "yes", "no", NOTHING, ",", "an", "and")
    )
)
