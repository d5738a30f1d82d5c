"""Weights of a model of lean layers as the kernels see them (lean_layer.h, lean_rows.c): its layers, its embeddings and its head.

Shapes: C hidden width, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ctypes import Structure, c_double, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workers.mechanisms.fusing import is_hooked
from workers.mechanisms.large_pages import move_together
from workers.mechanisms.lean_memory import is_row
from workers.mechanisms.linear import Lookup
from workers.mechanisms.packed_linear import Int8Linear, PackedLinear
from workers.mechanisms.packed_rows import FINE, PackedMap, packed_map
from workers.mechanisms.rounded_input import RoundedInput

if TYPE_CHECKING:
    from workers.mechanisms.lean import LeanLayer, Norm


class Shape(Structure):
    """A layer as the kernel sees it (``layer`` in lean_layer.h); of the head only the first map and norm are set.

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
    maps = [_kernel_map(module) for module in layer.maps]
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
    found = _kernel_map(head)
    if found is None or not _is_plain(norm):
        return None
    shape = Shape(qkv=found, norm_in=norm.weight.data_ptr(), eps_in=norm.eps)
    shape.kept = [norm.weight, *found.tensors]
    return shape


def packed_maps(modules: Iterable[nn.Module]) -> list[PackedLinear]:
    """The packed weights among these maps that our kernels multiply, without the rounding in front of them."""
    inner = [module.inner if type(module) is RoundedInput else module for module in modules]
    return [m for m in inner if isinstance(m, PackedLinear) and packed_map(m.packed_weights()) is not None]


def gather(maps: Sequence[PackedLinear]) -> None:
    """Have these weights one after the other in large pages."""
    move_together(maps)
    for each in maps:
        each.moved()


def _kernel_map(module: nn.Module) -> PackedMap | None:
    """The weights of a map that our kernels multiply and nobody looks into, with or without a policy's rounding in front of it."""
    rounded = type(module) is RoundedInput
    inner = module.inner if rounded else module
    if not isinstance(inner, PackedLinear) or is_hooked(module) or is_hooked(inner) or module.bias is not None:
        return None
    return packed_map(inner.packed_weights(), 8 if rounded else FINE)


def _is_plain(of: Norm | nn.Embedding) -> bool:
    return is_row(of.weight) and of.weight.is_cpu


class Ends(Structure):
    """What stands before and behind the layers (``ends`` in lean_rows.c).

    Attributes:
        kept: tensors that it points into.
    """

    kept: list[Tensor]
    _fields_ = (
        ("rows", c_void_p),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("vocabulary", c_int64),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("positions", c_int64),
        ("head", Shape),
    )

    def turn_by(self, cosines: Tensor, sines: Tensor) -> None:
        """Angles of all positions [positions, D]."""
        self.angles = (cosines, sines)
        self.cosines, self.sines, self.positions = cosines.data_ptr(), sines.data_ptr(), len(cosines)


def ends_of(embeddings: nn.Module, head: Shape) -> Ends | None:
    """Embeddings and head for the kernel, the angles still to come; None where it does not know the embeddings."""
    if is_hooked(embeddings) or "forward" in vars(embeddings):
        return None
    made, table = Ends(head=head), _read_from(embeddings)
    made.kept = list(head.kept)
    if type(table) is Int8Linear:
        codes, scales = table.codes, table.scales
        if not codes.is_contiguous() or scales.dtype != torch.bfloat16:
            return None
        made.codes, made.scales = codes.data_ptr(), scales.data_ptr()
        made.kept += [codes, scales]
        (made.vocabulary, width) = codes.shape
    elif type(table) is nn.Embedding and table.max_norm is None and _is_plain(table):
        made.rows = table.weight.data_ptr()
        made.kept.append(table.weight)
        (made.vocabulary, width) = table.weight.shape
    else:
        return None
    return made if width == head.qkv.k else None


def _read_from(embeddings: nn.Module) -> nn.Module:
    """What the rows are read from: the packed weights of the head, or the embeddings themselves."""
    if type(embeddings) is not Lookup or embeddings.dtype != torch.float32:
        return embeddings
    table: nn.Module = embeddings.table
    return table.inner if type(table) is RoundedInput else table
