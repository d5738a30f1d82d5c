"""Opening images that people hand in: upright, in RGB, of a size that can be worked with.

Phones store photographs lying on their side with a note; icons are transparent; scans are grey; and
some files only claim to be images. Everything behind this file sees an upright RGB image.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from studio_state.errors import WorkloadError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MOST_PIXELS = 200_000_000  # a larger image is refused before it is unpacked
LONGEST_EDGE = 2048  # larger ones are shrunk; no vision model of the studio looks closer
SMOOTH = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")  # pixels that can be averaged as they are
SHOWN_EDGE = 384
ACROSS = 4  # frames of a clip in one row, where all are shown in one picture
JPEG_SAVES_FROM = 128  # pixels an edge; below that a PNG is small and exact


class Picture(Protocol):
    """Where the image of an item comes from; opened when it is needed."""

    def open(self) -> Image.Image:
        """The upright RGB image."""
        ...


@runtime_checkable
class ClipLike(Picture, Protocol):
    """Several images in the order of time; what opens is all of them in one picture."""

    def frames(self) -> list[Image.Image]:
        """Upright RGB images of one size."""
        ...


@dataclass(frozen=True)
class FilePicture:
    """An image file."""

    path: Path

    def open(self) -> Image.Image:
        """Read it.

        Raises:
            WorkloadError: not there, not an image, damaged, or far too large.
        """
        return open_image(self.path)


@dataclass(frozen=True)
class ArrayPicture:
    """Grey bytes [H, W] or colour bytes [H, W, 3]."""

    pixels: NDArray[np.uint8]

    def open(self) -> Image.Image:
        """The array as an RGB image."""
        return Image.fromarray(self.pixels).convert("RGB")


def opened(picture: Picture) -> tuple[Image.Image, list[Image.Image]]:
    """A picture, and what a model is shown of it: the frames of a clip, else the picture itself."""
    image = picture.open()
    return image, picture.frames() if isinstance(picture, ClipLike) else [image]


def side_by_side(frames: Sequence[Image.Image]) -> Image.Image:
    """Images of one size in one picture, ``ACROSS`` a row."""
    columns, rows = sheet(len(frames))
    width, height = frames[0].size
    picture = Image.new("RGB", (columns * width, rows * height), "white")
    for n, frame in enumerate(frames):
        picture.paste(frame, (n % columns * width, n // columns * height))
    return picture


def sheet(frames: int) -> tuple[int, int]:
    """Columns and rows of the picture that shows so many frames."""
    columns = min(frames, ACROSS)
    return columns, -(-frames // columns)


def open_image(path: Path) -> Image.Image:
    """An image file as people mean it: upright, RGB, transparency on white, its longest edge at most 2,048 pixels.

    Raises:
        WorkloadError: one sentence, see :class:`FilePicture`.
    """
    with _reading(path) as file:
        shrink = LONGEST_EDGE / max(file.size)
        if shrink < 1:
            fitting = max(1, int(file.width * shrink)), max(1, int(file.height * shrink))
            file.draft("RGB", fitting)  # a JPEG is unpacked at half, a quarter or an eighth of its size
            if file.mode in SMOOTH and "transparency" not in file.info:  # before anything copies it
                file.thumbnail((LONGEST_EDGE, LONGEST_EDGE), Image.Resampling.LANCZOS)
        return upright_rgb(file)


def check_image(path: Path) -> None:
    """Look at an image file without unpacking it: quick enough for every image of a workload before anything runs.

    What is cut off in the middle of its pixels shows only in some formats (PNG) here, in all of them when it is opened.

    Raises:
        WorkloadError: one sentence, see :class:`FilePicture`.
    """
    with _reading(path) as file:
        file.verify()


@contextmanager
def _reading(path: Path) -> Iterator[Image.Image]:
    """The file, its header read; whatever fails becomes one sentence."""
    name = repr(str(path))
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # our own limit, checked before unpacking
    try:
        if not path.is_file():
            raise WorkloadError(f"the image {name} is not there; give the path of an image file ({', '.join(SUFFIXES)})")
        with Image.open(path) as file:
            if file.width * file.height > MOST_PIXELS:
                raise WorkloadError(
                    f"the image {name} has {file.width} x {file.height} pixels; at most {MOST_PIXELS // 1_000_000} megapixels are "
                    "allowed, save a smaller copy"
                )
            yield file
    except (WorkloadError, MemoryError):
        raise
    except UnidentifiedImageError as e:
        raise WorkloadError(f"{name} is not an image that can be read; allowed: {', '.join(SUFFIXES)}") from e
    except Exception as e:  # damaged files raise anything, from OSError to struct.error, depending on the format
        reason = (str(e) or type(e).__name__).split("\n")[0]
        raise WorkloadError(f"the image {name} is damaged ({reason}); save it again") from e
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turned as its EXIF note says, on white where it is transparent, shrunk to the longest edge allowed."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # 16-bit and float greys: their range is not 0..255
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
        low, high = float(grey.min()), float(grey.max())
        image = Image.fromarray(((grey - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    image = image.convert("RGB")
    if max(image.size) > LONGEST_EDGE:
        image.thumbnail((LONGEST_EDGE, LONGEST_EDGE), Image.Resampling.LANCZOS)
    return image


def shown(image: Image.Image) -> dict[str, Any]:
    """A small copy to be sent to the screen: mime type, base64 data, and the size of the image itself."""
    small = image.copy()
    small.thumbnail((SHOWN_EDGE, SHOWN_EDGE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    is_small = max(small.size) <= JPEG_SAVES_FROM
    small.save(buffer, "PNG" if is_small else "JPEG", **({} if is_small else {"quality": 82}))
    return {
        "mime": "image/png" if is_small else "image/jpeg",
        "data": base64.b64encode(buffer.getvalue()).decode(),
        "width": image.width,
        "height": image.height,
    }


def as_png(values: NDArray[np.floating[Any]]) -> str:
    """Values [H, W] or [H, W, 3] from 0 to 1 as a base64 PNG."""
    buffer = io.BytesIO()
    Image.fromarray((np.clip(values, 0, 1) * 255).round().astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
