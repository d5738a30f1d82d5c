"""As much of Triton's language as the studio's kernel speaks, in NumPy: programs one after another, pointers as places in an array.

So the source of the kernel itself runs where Triton is not installed. A load or store outside of its tensor is an error here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

NAMES = ("triton", "triton.language", "workers.mechanisms.tiled_csl_kernel")


class Block(np.ndarray):
    """A block of numbers with Triton's way to convert them."""

    def to(self, dtype: Any) -> Any:
        return self.astype(dtype)


def block(x: Any) -> Any:
    return np.asarray(x).view(Block)


@dataclass
class Pointer:
    """Places in a flat array."""

    array: NDArray[Any]
    at: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.array, self.at + more)

    def inside(self, mask: Any) -> Any:
        at = np.where(mask, self.at, 0)
        assert at.min() >= 0, "before the tensor's start"
        return at


def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Any:
    if len(pointer.array) == 0:
        assert not np.any(mask), "an empty tensor is read"
        return block(np.full(np.shape(mask), other, pointer.array.dtype))
    return block(np.where(mask, pointer.array[pointer.inside(mask)], np.asarray(other, pointer.array.dtype)))


def store(pointer: Pointer, value: Any, mask: Any) -> None:
    pointer.array[pointer.at[mask]] = value[mask]


def histogram(values: Any, bins: int, mask: Any) -> Any:
    return block(np.bincount(values[mask], minlength=bins).astype(np.int32))


def dot(a: Any, b: Any, total: Any) -> Any:
    return total + a.astype(np.float32) @ b.astype(np.float32)


class Kernel:
    """A function over a grid of programs."""

    def __init__(self, function: Callable[..., None], language: ModuleType):
        self.function, self.language = function, language

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            given = [Pointer(a.numpy().reshape(-1)) if isinstance(a, torch.Tensor) else a for a in args]
            for place in product(*map(range, grid)):
                self.language.program_id = place.__getitem__  # type: ignore[attr-defined]
                self.function(*given, **constants)

        return launch


@contextmanager
def speaking() -> Iterator[None]:
    """Modules of Triton's names, while the context is open."""
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    vars(triton).update(
        language=language,
        jit=lambda f: Kernel(f, language),
        cdiv=lambda a, b: -(-a // b),
        next_power_of_2=lambda n: 1 << (n - 1).bit_length(),
    )
    vars(language).update(
        constexpr=int,
        float32=np.float32,
        int32=np.int32,
        arange=lambda a, b: block(np.arange(a, b)),
        zeros=lambda shape, dtype: block(np.zeros(shape, dtype)),
        minimum=min,
        reshape=lambda x, shape: x.reshape(shape),
        trans=lambda x: x.T,
        cumsum=lambda x, axis: x.cumsum(axis),
        load=load,
        store=store,
        histogram=histogram,
        dot=dot,
    )
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    sys.modules.update({"triton": triton, "triton.language": language})
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
