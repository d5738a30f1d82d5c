"""Products of a few rows with weights packed in 4 or 8 bits, the rows rounded to 8 bits by group: integers are multiplied.

PyTorch's products with such weights widen every weight to a float first, and spend their time on that. Numbers are those of
:func:`workers.mechanisms.rounded_input.by_group` and a float32 product, up to the order of its sums. Each row of the output
depends on its own row of the input only, bit by bit, whatever runs beside it.

Shapes: m input rows, N output rows, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import Structure, byref, c_int, c_int64, c_long, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from workers.mechanisms.native import kernels
from workers.mechanisms.packed_linear import Int4Linear, Int8Linear
from workers.mechanisms.packing import BLOCK

GROUP = 64  # inputs that share a scale beside 8-bit weights; beside 4-bit ones it is the weights' own group
ROWS = 64  # more input rows are faster as a product of floats
INT4, INT8 = "native::int4_linear", "native::int8_linear"  # the names that a profiler sees
_WIDTH = 16  # groups and K are multiples of it
Product = Callable[[Tensor], Tensor]


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
        ("codes", c_void_p),
        ("scales", c_void_p),
    )


def packed_map(module: nn.Module, group: int) -> PackedMap | None:
    """The packed weights of a module on a CPU, its bias left out.

    Args:
        group: inputs that share a scale.

    Returns:
        None where they cannot be multiplied so: another module or group, no compiler, another processor.
    """
    if module.in_features % _WIDTH or group % _WIDTH or kernels().library is None:
        return None
    if isinstance(module, Int4Linear) and module.group == group and 2 * module.packed.shape[2] == BLOCK:
        bits, height, codes, scales = 4, module.grid.shape[1], module.packed, module.grid
    elif isinstance(module, Int8Linear) and group == GROUP:
        bits, height, codes, scales = 8, module.out_features, module.codes, module.scales
    else:
        return None
    if not codes.is_cpu:
        return None
    made = PackedMap(bits, module.in_features, module.out_features, group, height, codes.data_ptr(), scales.data_ptr())
    made.tensors = (codes, scales)
    return made


def product_of(module: nn.Module, group: int) -> Product | None:
    """The map [..., K] -> [..., N] by the packed weights of a module on a CPU, contiguous float32 both, without bias.

    Args:
        group: inputs that share a scale.

    Returns:
        None where there is no such product (:func:`packed_map`).
    """
    weights = packed_map(module, group)
    return None if weights is None else _bound(INT4 if weights.bits == 4 else INT8, weights)


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
