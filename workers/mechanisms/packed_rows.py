"""Products of a few rows with weights packed in 4 or 8 bits, in kernels of our own.

The rows are rounded by group, to 8 bits where a policy asks for it, else to 16, so that the kernels multiply integers: a 65,278th
of what the largest input of a group spans, where PyTorch's products with such weights round the rows to bfloat16, whose steps are
a 256th of a number. Numbers are those of a float32 product of the stored weights with the rows so rounded
(:func:`workers.mechanisms.rounded_input.by_group`), up to the order of its sums. Each row of the output depends on its own row of
the input only, bit by bit, whatever runs beside it.

Shapes: m input rows, N output rows, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import Structure, byref, c_int, c_int64, c_long, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from workers.mechanisms.native import kernels

FINE = 16  # bits of an input that no policy rounds
GROUP = 64  # inputs that share a scale beside 8-bit weights; beside 4-bit ones it is the weights' own group
FINE_GROUP = 256  # the same of inputs that no policy rounds
ROWS = 64  # more input rows are faster as a product of floats
INT4, INT8 = "native::int4_linear", "native::int8_linear"  # the names that a profiler sees
_WIDTH = 16  # groups and K are multiples of it
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Packed:
    """Weights in one of the two formats that the kernels read.

    Attributes:
        codes: 4 bits: uint8 [N'/64, K/4, 32, 4], N' padded rows; 8 bits: int8 [N, K].
        scales: 4 bits: bfloat16 [K/g, N', 2] (scale, zero); 8 bits: bfloat16 [N].
        group: inputs whose weights share a scale.
        height: N'.
    """

    bits: int
    codes: Tensor
    scales: Tensor
    k: int
    n: int
    group: int
    height: int


class PackedMap(Structure):
    """A linear map without bias, as the kernels see it (``map`` in packed_rows.h).

    Attributes:
        tensors: what ``codes`` and ``scales`` point into.
    """

    tensors: tuple[Tensor, Tensor]
    _fields_ = (
        ("bits", c_int64),
        ("k", c_int64),
        ("n", c_int64),
        ("group", c_int64),
        ("height", c_int64),
        ("planes", c_int64),
        ("codes", c_void_p),
        ("scales", c_void_p),
    )


def reads_groups(group: int) -> bool:
    """True if the kernel of this machine multiplies weights of 4 bits with so many inputs a scale."""
    return group % _WIDTH == 0 and kernels().library is not None


def packed_map(weights: Packed | None, input_bits: int = FINE) -> PackedMap | None:
    """The weights for the kernels.

    Args:
        input_bits: what goes in is rounded to, by group: 8 or 16.

    Returns:
        None where they cannot be multiplied so: another shape or device, no compiler, another processor.
    """
    if weights is None or weights.k % _WIDTH or not weights.codes.is_cpu or not reads_groups(weights.group):
        return None
    group = weights.group if weights.bits == 4 else GROUP if input_bits == 8 else FINE_GROUP
    sizes = (weights.bits, weights.k, weights.n, group, weights.height, input_bits // 8)
    made = PackedMap(*sizes, weights.codes.data_ptr(), weights.scales.data_ptr())
    made.tensors = (weights.codes, weights.scales)
    return made


def product_of(weights: Packed | None, input_bits: int = FINE) -> Product | None:
    """The map [..., K] -> [..., N], contiguous float32 both, without bias; None where there is none (:func:`packed_map`)."""
    found = packed_map(weights, input_bits)
    return None if found is None else _bound(INT4 if found.bits == 4 else INT8, found)


def _bound(name: str, weights: PackedMap) -> Product:
    """A product with as little Python as it takes: there are over a hundred at every step."""
    run, n, empty, threads = _function(), weights.n, torch.empty, torch.get_num_threads
    where, is_profiled = byref(weights), torch.autograd._profiler_enabled

    def product(x: Tensor) -> Tensor:
        *some, k = x.shape
        y = empty((*some, n))
        arguments = (where, x.data_ptr(), x.numel() // k, y.data_ptr(), threads())
        if is_profiled():  # ours are no operators, which a profiler would see by itself
            with torch.autograd.profiler.record_function(name):
                failed = run(*arguments)
        else:
            failed = run(*arguments)
        if failed:
            raise MemoryError
        return y

    return product


@cache
def _function() -> Any:
    library: Any = kernels().library
    run = library.product
    run.argtypes = [c_void_p, c_void_p, c_long, c_void_p, c_int]
    return run
