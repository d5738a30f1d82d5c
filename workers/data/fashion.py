"""Fashion-MNIST: 28 x 28 grey photographs of clothes in ten classes (Zalando Research, MIT licence).

The 10,000 test images ship with the studio; the 60,000 training images are read from a folder.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from studio_state.catalog import asset
from studio_state.errors import WorkloadError

CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
TEST_FOLDER = "workloads/fashion-mnist"


@cache
def held_out() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images [10000, 28, 28] and labels [10000] that ship with the studio; both cannot be written to."""
    return read_split(asset(TEST_FOLDER), "t10k")


@dataclass(frozen=True)
class FashionPicture:
    """One of the images that ship with the studio, by its number."""

    index: int

    def open(self) -> Image.Image:
        """The image [28, 28] in RGB."""
        return Image.fromarray(held_out()[0][self.index]).convert("RGB")


def read_split(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images [N, 28, 28] and labels [N] of ``train`` or ``t10k`` in a folder of the published files.

    Raises:
        WorkloadError: the files are not there.
    """
    images, labels = folder / f"{split}-images-idx3-ubyte.gz", folder / f"{split}-labels-idx1-ubyte.gz"
    for path in (images, labels):
        if not path.is_file():
            raise WorkloadError(
                f"{path} is not there; Fashion-MNIST is published as four .gz files "
                "(Debian: apt install dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist)"
            )
    return read_idx(images), read_idx(labels)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped IDX file of bytes: two zeros, type 8, the number of axes, their sizes (big-endian), the bytes."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise WorkloadError(f"{path} is not an IDX file of bytes")
    axes = data[3]
    shape = np.frombuffer(data, ">u4", axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(tuple(int(n) for n in shape))
