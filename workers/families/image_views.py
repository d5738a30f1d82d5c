"""Geometry of image preparation: which part of an image is seen after padding, resizing, cutting and tiling.

Positions along an edge are fractions of the original image: 0 is its left (top) side, 1 its right (bottom)
one; what lies beyond is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from studio_state.errors import Unavailable

UNIT = 10_000  # parts into which each edge of an image is divided

Span = tuple[float, float]
View = tuple[Span, Span]  # across, down
Sides = tuple[int, int]  # rows, columns
WHOLE: View = ((0.0, 1.0), (0.0, 1.0))


def box_of(view: View) -> list[int]:
    """In ten-thousandths, cut at the sides of the image; [] if nothing is left."""
    (left, right), (top, bottom) = ([round(UNIT * min(max(x, 0.0), 1.0)) for x in span] for span in view)
    return [left, top, right, bottom] if left < right and top < bottom else []


def fractions(box: Sequence[int]) -> View:
    """The view of a box [left, top, right, bottom] in ten-thousandths."""
    left, top, right, bottom = (x / UNIT for x in box)
    return (left, right), (top, bottom)


def framed(width: int, height: int, pixels: Sides, image_processor: Any) -> View:
    """What of an image is seen after it was padded to a square, resized and cut, as far as the settings ask for it.

    Args:
        width, height: of the image; pixels: (height, width) of what was made of it.

    Raises:
        Unavailable: the settings are not known here, or make something of another size.
    """
    view = WHOLE
    if getattr(image_processor, "do_pad", False) and hasattr(image_processor, "pad_to_square"):
        square = max(width, height)
        view, width, height = (padded(width, square), padded(height, square)), square, square
    if image_processor.do_resize:
        width, height = _resized(width, height, image_processor)
    made = (height, width)
    if getattr(image_processor, "do_center_crop", False):
        made = (image_processor.crop_size.height, image_processor.crop_size.width)
    if made != pixels:
        raise Unavailable(
            f"{type(image_processor).__name__} makes {made[1]} x {made[0]} pixels of this image, but {pixels[1]} x {pixels[0]} "
            "were given; give what it made with its own settings"
        )
    return within(view, (_cut(width, made[1]), _cut(height, made[0])))


def _resized(width: int, height: int, image_processor: Any) -> tuple[int, int]:
    """Width and height after resizing.

    Raises:
        Unavailable: neither a fixed size nor one for the shorter edge.
    """
    size = image_processor.size
    if size.height and size.width:
        return size.width, size.height
    if size.shortest_edge and not size.longest_edge:
        longer = int(size.shortest_edge * max(width, height) / min(width, height))
        return (size.shortest_edge, longer) if width <= height else (longer, size.shortest_edge)
    raise Unavailable(
        f"{type(image_processor).__name__} resizes by {', '.join(dict(size))}, and where its tokens lie is only known for "
        "height and width or shortest_edge; set one of these as its size"
    )


def padded(edge: int, target: int) -> Span:
    """What an edge spans after padding it on both sides to ``target`` pixels, the odd one behind."""
    start = -((target - edge) // 2)
    return start / edge, (start + target) / edge


def _cut(edge: int, target: int) -> Span:
    """What an edge spans after cutting ``target`` pixels from its middle; padded, if there are fewer, the odd one before."""
    start = (edge - target) // 2
    return start / edge, (start + target) / edge


def within(view: View, part: View) -> View:
    """A part of a view, given in fractions of the view."""
    across, down = ((lo + (hi - lo) * a, lo + (hi - lo) * b) for (lo, hi), (a, b) in zip(view, part, strict=True))
    return across, down


def patched(view: View, pixels: Sides, cell: int | Sequence[int]) -> tuple[View, Sides]:
    """The part of a view that whole cells cover (what is left at its right and bottom is not seen), and its cells."""
    down, across = pair(cell)
    side = (pixels[0] // down, pixels[1] // across)
    return within(view, ((0.0, side[1] * across / pixels[1]), (0.0, side[0] * down / pixels[0]))), side


def tiled(view: View, grid: Sides) -> list[View]:
    """A view cut into rows and columns, in reading order."""
    rows, columns = grid
    return [
        within(view, ((c / columns, (c + 1) / columns), (r / rows, (r + 1) / rows))) for r in range(rows) for c in range(columns)
    ]


def pair(size: int | Sequence[int]) -> Sides:
    """A size that configs give once or per edge (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
