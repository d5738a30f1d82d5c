"""Products of a few rows with weights packed in 4 or 8 bits, the rows rounded to 8 bits by group: integers are multiplied.

PyTorch's products with such weights widen every weight to a float first, and spend their time on that. Numbers are those of
:func:`workers.mechanisms.rounded_input.by_group` and a float32 product, up to the order of its sums. Each row of the output
depends on its own row of the input only, bit by bit, whatever runs beside it.

Shapes: m input rows, N output rows, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int, c_long, c_void_p
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


def product_of(module: nn.Module, group: int) -> Product | None:
    """The map [..., K] -> [..., N] by the packed weights of a module on a CPU, contiguous float32 both, without bias.

    Args:
        group: inputs that share a scale.

    Returns:
        None where there is no such product: of another module or group, without a compiler, on another processor.
    """
    if module.in_features % _WIDTH or group % _WIDTH or kernels().library is None:
        return None
    if isinstance(module, Int4Linear) and module.group == group and 2 * module.packed.shape[2] == BLOCK:
        sizes = (module.group, module.grid.shape[1], module.out_features)
        return _bound(INT4, _functions()[0], module.packed, module.grid, sizes)
    if isinstance(module, Int8Linear) and group == GROUP:
        return _bound(INT8, _functions()[1], module.codes, module.scales, (module.out_features,))
    return None


def _bound(name: str, run: Callable[..., int], weights: Tensor, scales: Tensor, sizes: tuple[int, ...]) -> Product:
    """A product with as little Python as it takes: there are over a hundred at every step."""
    n, empty, threads, is_profiled = sizes[-1], torch.empty, torch.get_num_threads, torch.autograd._profiler_enabled

    def product(x: Tensor) -> Tensor:
        *some, k = x.shape
        y = empty((*some, n))
        arguments = (x.data_ptr(), x.numel() // k, k, weights.data_ptr(), scales.data_ptr(), *sizes, y.data_ptr(), threads())
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
def _functions() -> tuple[Any, Any]:
    library: Any = kernels().library
    int4, int8 = library.int4_rows, library.int8_rows
    int4.argtypes = [c_void_p, c_long, c_long, c_void_p, c_void_p, c_long, c_long, c_long, c_void_p, c_int]
    int8.argtypes = [c_void_p, c_long, c_long, c_void_p, c_void_p, c_long, c_void_p, c_int]
    return int4, int8
