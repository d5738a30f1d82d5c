"""Lean layers whose linear maps multiply integers: everything around the attention in one native call a layer.

A decode step of a small model spends as long on some thirty calls a layer as on reading its weights. Here norms, products, rotary
turns, the activation and the sums in between run in one parallel region from one attention to the next; the attention itself
stays the one function that cache policies hang on. Numbers are those of :class:`~workers.mechanisms.lean.LeanLayer` up to the
order of sums, each row by itself.

Shapes: B batch, T new tokens, C hidden width, Hq query heads, H key-value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, byref, c_double, c_int, c_int64, c_long, c_void_p
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workers.mechanisms.attention import Forward, attend
from workers.mechanisms.fusing import is_hooked
from workers.mechanisms.native import kernels
from workers.mechanisms.packed_rows import ROWS, PackedMap, packed_map
from workers.mechanisms.rounded_input import RoundedInput

if TYPE_CHECKING:
    from workers.mechanisms.lean import LeanLayer, Norm, Rotary

NAME = "native::linear_rows"  # what a profiler sees


class Shape(Structure):
    """A layer as the kernel sees it (``layer`` in lean_rows.c); of the head only the first map and norm are set.

    Attributes:
        kept: tensors that it points into.
    """

    kept: list[Tensor]
    _fields_ = (
        ("qkv", PackedMap),
        ("out", PackedMap),
        ("gate_up", PackedMap),
        ("down", PackedMap),
        ("norm_in", c_void_p),
        ("norm_mlp", c_void_p),
        ("eps_in", c_double),
        ("eps_mlp", c_double),
        ("width", c_int64),
        ("turned", c_int64),
    )


def shape_of(layer: LeanLayer) -> Shape | None:
    """The layer for the kernel; None where one of its parts is not of the kind that the kernel knows."""
    maps = [_integer_map(module) for module in layer.maps]
    norms = (layer.norm_in, layer.norm_mlp)
    if any(m is None for m in maps) or not all(map(_is_plain, norms)) or layer.head_norm is not None or layer.width % 2:
        return None
    found: list[Any] = maps
    shape = Shape(
        *found,
        *(norm.weight.data_ptr() for norm in norms),
        *(norm.eps for norm in norms),
        layer.width,
        layer.query_heads + layer.kv_heads,
    )
    shape.kept = [*(norm.weight for norm in norms), *(x for m in found for x in m.tensors)]
    return shape


def head_of(norm: Norm, head: nn.Module) -> Shape | None:
    """The last norm and the head for the kernel, or None."""
    found = _integer_map(head)
    if found is None or not _is_plain(norm):
        return None
    shape = Shape(qkv=found, norm_in=norm.weight.data_ptr(), eps_in=norm.eps)
    shape.kept = [norm.weight, *found.tensors]
    return shape


def _integer_map(module: nn.Module) -> PackedMap | None:
    """The packed weights of a map behind 8-bit rounding that nobody looks into."""
    if type(module) is not RoundedInput or is_hooked(module) or module.bias is not None:
        return None
    return packed_map(module.inner, module.group)


def _is_plain(norm: Norm) -> bool:
    return norm.weight.dtype == torch.float32 and norm.weight.is_contiguous()


class LeanRows:
    """Consecutive layers: hidden states [B, T, C] -> [B, T, C].

    Args:
        layers, shapes: the same layers for either side; wide inputs and other number formats run through the former.
    """

    def __init__(self, layers: Sequence[LeanLayer], shapes: Sequence[Shape]):
        self.layers, self.shapes = list(layers), list(shapes)
        first = self.layers[0]
        self.sizes = (first.query_heads, first.kv_heads, first.kv_heads)
        self.at = [byref(shape) for shape in self.shapes]

    def __call__(self, hidden: Tensor, rotary: Rotary, forward: Forward) -> Tensor:
        b, t, _ = hidden.shape
        width, cosines, sines = self.layers[0].width, *rotary
        if not (b * t <= ROWS and cosines.numel() == b * t * width and all(map(_is_row, (hidden, cosines, sines)))):
            for layer in self.layers:
                hidden = layer(hidden, rotary, forward)
            return hidden
        heads = hidden.new_empty(b, t, sum(self.sizes), width)
        turns = (cosines.data_ptr(), sines.data_ptr(), b * t)
        call_between(None, self.at[0], None, hidden.data_ptr(), *turns, None, heads.data_ptr())
        for at, following, layer in zip(self.at, [*self.at[1:], None], self.layers, strict=True):
            query, key, value = heads.transpose(1, 2).split_with_sizes(self.sizes, 1)
            mixed = attend(forward, layer.index, query, key, value, layer.scaling, layer.window).contiguous()
            out, heads = torch.empty_like(hidden), torch.empty_like(heads)
            call_between(at, following, mixed.data_ptr(), hidden.data_ptr(), *turns, out.data_ptr(), heads.data_ptr())
            hidden = out
        return hidden


class HeadRows:
    """The last norm and the head: hidden states [B, T, C] -> logits [B, T, V]."""

    def __init__(self, shape: Shape):
        self.shape, self.at = shape, byref(shape)

    def __call__(self, hidden: Tensor) -> Tensor | None:
        """None where the rows are too many or of another number format."""
        b, t, _ = hidden.shape
        if b * t > ROWS or not _is_row(hidden):
            return None
        logits = hidden.new_empty(b, t, self.shape.qkv.n)
        call_between(None, self.at, None, hidden.data_ptr(), None, None, b * t, None, logits.data_ptr())
        return logits


def _is_row(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_contiguous()


def call_between(*arguments: Any) -> None:
    """``between`` of lean_rows.c, seen by a profiler.

    Raises:
        MemoryError: there is no room to work in.
    """
    if torch.autograd._profiler_enabled():
        with torch.autograd.profiler.record_function(NAME):
            failed = _function()(*arguments, torch.get_num_threads())
    else:
        failed = _function()(*arguments, torch.get_num_threads())
    if failed:
        raise MemoryError


@cache
def _function() -> Any:
    library: Any = kernels().library
    run = library.between
    run.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_int]
    return run
