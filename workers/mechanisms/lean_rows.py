"""Lean layers whose weights are packed in 4 or 8 bits: one native call from attention to attention, or one for all layers.

A decode step of a small model spends as long on some thirty calls a layer as on reading its weights. Here norms, products, rotary
turns, the activation and the sums in between run in one parallel region from one attention to the next; the attention itself
stays the one function that cache policies hang on. Where the cache is plain and nobody looks, the attention runs in there too and
a step is one call. Numbers are those of :class:`~workers.mechanisms.lean.LeanLayer` up to the order of sums, each row by itself.

Shapes: B batch, T new tokens, C hidden width, Hq query heads, H key-value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ctypes import POINTER, Structure, byref, c_double, c_int, c_int64, c_long, c_void_p, pointer
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from workers.mechanisms.attention import Forward, attend
from workers.mechanisms.cache import HeadGroup, KVLayer
from workers.mechanisms.fusing import is_hooked
from workers.mechanisms.large_pages import move_together
from workers.mechanisms.native import kernels
from workers.mechanisms.packed_linear import PackedLinear
from workers.mechanisms.packed_rows import FINE, ROWS, PackedMap, packed_map
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


def _is_plain(norm: Norm) -> bool:
    return norm.weight.dtype == torch.float32 and norm.weight.is_contiguous()


class Memory(Structure):
    """What a head of a layer remembers, as the kernel sees it (``memory`` in lean_rows.c)."""

    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("row", c_int64), ("length", c_int64))


class Memories:
    """What all heads of some layers remember, where that is plain floats, read whole, with room for one more entry.

    Args:
        groups: the heads of all layers, in their order.
        rooms: where their entries are: keys and values [B, H, room, D].
    """

    def __init__(self, groups: Sequence[HeadGroup], rooms: Sequence[tuple[Tensor, Tensor]]):
        self.groups, self.rooms = groups, rooms
        self.heads = (Memory * sum(g.stop - g.start for g in groups))()
        self.lengths = np.frombuffer(self.heads, dtype=np.int64).reshape(len(self.heads), -1)[:, 3]  # one write for all
        at = 0
        for keys, values in rooms:
            gap = keys.stride(1) * keys.element_size()
            for head in range(keys.shape[1]):
                self.heads[at] = Memory(keys.data_ptr() + head * gap, values.data_ptr() + head * gap, keys.stride(0))
                at += 1

    @classmethod
    def of(cls, layers: Sequence[KVLayer], shape: tuple[int, int, int], before: Memories | None) -> Memories | None:
        """The memories of these layers; None where one of them is of another kind.

        Args:
            shape: rows, heads of a layer and their width.
            before: those of the last step, used again where nothing moved.
        """
        groups = [g for layer in layers for g in layer.groups]
        rooms = [g.room() for g in groups]
        if before is None or not before.is_at(rooms):
            plain = [room for room in rooms if room is not None]
            if len(plain) < len(rooms) or any(layer.heads != shape[1] for layer in layers):
                return None
            rows, _, width = shape
            if not all(_is_row(k) and _is_row(v) and k.shape == v.shape and k.shape[::3] == (rows, width) for k, v in plain):
                return None
            before = cls(groups, plain)
        before.groups = groups
        before.lengths[:] = [g.store.length for g in groups for _ in range(g.start, g.stop)]
        return before

    def is_at(self, rooms: Sequence[tuple[Tensor, Tensor] | None]) -> bool:
        """True if the entries are where they were."""
        return len(rooms) == len(self.rooms) and all(
            there is not None and here[0] is there[0] and here[1] is there[1]
            for here, there in zip(self.rooms, rooms, strict=True)
        )


class LeanRows:
    """Consecutive layers: hidden states [B, T, C] -> [B, T, C].

    Single new tokens over a plain cache, that nobody looks at, go through all layers in one call; else there is one call from each
    attention to the next.

    Args:
        layers, shapes: the same layers for either side; wide inputs and other number formats run through the former.
    """

    def __init__(self, layers: Sequence[LeanLayer], shapes: Sequence[Shape]):
        self.layers, self.shapes = list(layers), list(shapes)
        first = self.layers[0]
        self.sizes = (first.query_heads, first.kv_heads, first.kv_heads)
        self.at = [byref(shape) for shape in self.shapes]
        self.indices = [layer.index for layer in self.layers]
        self.pointers = (POINTER(Shape) * len(self.shapes))(*map(pointer, self.shapes))
        self.scales = (c_double * len(self.layers))(*(layer.scaling for layer in self.layers))
        self.memories: Memories | None = None
        fits = knows_width(first.width) and first.query_heads % first.kv_heads == 0
        self.alike = fits and all(_outline(layer) == _outline(first) and layer.window is None for layer in self.layers)

    def __call__(self, hidden: Tensor, rotary: Rotary, forward: Forward) -> Tensor:
        b, t, _ = hidden.shape
        width, cosines, sines = self.layers[0].width, *rotary
        if not (b * t <= ROWS and cosines.numel() == b * t * width and all(map(_is_row, (hidden, cosines, sines)))):
            for layer in self.layers:
                hidden = layer(hidden, rotary, forward)
            return hidden
        turns = (cosines.data_ptr(), sines.data_ptr(), b * t)
        if t == 1 and self.alike and is_unwatched(forward):
            layers = [forward.cache.layers[index] for index in self.indices]
            self.memories = Memories.of(layers, (b, self.sizes[1], width), self.memories)
            if self.memories is not None:
                return self._through(self.memories, hidden, turns, forward)
        heads = hidden.new_empty(b, t, sum(self.sizes), width)
        call_between(None, self.at[0], None, hidden.data_ptr(), *turns, None, heads.data_ptr())
        for at, following, layer in zip(self.at, [*self.at[1:], None], self.layers, strict=True):
            query, key, value = heads.transpose(1, 2).split_with_sizes(self.sizes, 1)
            mixed = attend(forward, layer.index, query, key, value, layer.scaling, layer.window).contiguous()
            out, heads = torch.empty_like(hidden), torch.empty_like(heads)
            call_between(at, following, mixed.data_ptr(), hidden.data_ptr(), *turns, out.data_ptr(), heads.data_ptr())
            hidden = out
        return hidden

    def _through(self, memories: Memories, hidden: Tensor, turns: tuple[int, int, int], forward: Forward) -> Tensor:
        """All layers in one call; the cache learns of its new entries afterwards."""
        out, heads = torch.empty_like(hidden), hidden.new_empty(hidden.shape[0], sum(self.sizes), self.layers[0].width)
        where = (self.pointers, len(self.layers), memories.heads, self.scales)
        call_through(*where, hidden.data_ptr(), *turns, out.data_ptr(), heads.data_ptr())
        for g in memories.groups:
            g.wrote(forward.positions)
        for index in self.indices:
            forward.cache.layers[index].seen = forward.seen
        return out


def _outline(layer: LeanLayer) -> tuple[int, int, int]:
    return layer.width, layer.query_heads, layer.kv_heads


def is_unwatched(forward: Forward) -> bool:
    """True if nobody looks at the attention of this forward, or changes it; a profiler wants to see it apart too."""
    retains = forward.retain_queries and (forward.phase == "prefill" or forward.retain_on)
    touched = forward.attending or forward.reading or forward.observers or forward.narrowed or retains
    return not touched and forward.kernel == "sdpa" and not torch.autograd._profiler_enabled()


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
            failed = _between()(*arguments, torch.get_num_threads())
    else:
        failed = _between()(*arguments, torch.get_num_threads())
    if failed:
        raise MemoryError


def call_through(*arguments: Any) -> None:
    """``through`` of lean_rows.c.

    Raises:
        MemoryError: there is no room to work in.
    """
    if _through()(*arguments, torch.get_num_threads()):
        raise MemoryError


def knows_width(width: int) -> bool:
    """True if the kernel has an attention for heads of this width."""
    library: Any = kernels().library
    return bool(library.knows_width(c_long(width)))


@cache
def _through() -> Any:
    library: Any = kernels().library
    run = library.through
    run.argtypes = [c_void_p, c_long, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_int]
    return run


@cache
def _between() -> Any:
    library: Any = kernels().library
    run = library.between
    run.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_int]
    return run
