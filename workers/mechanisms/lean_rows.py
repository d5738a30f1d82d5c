"""Lean layers whose weights are packed in 4 or 8 bits: one native call from attention to attention, or one for all layers.

A decode step of a small model spends as long on some thirty calls a layer as on reading its weights. Here norms, products, rotary
turns, the activation and the sums in between run in one parallel region from one attention to the next; the attention itself
stays the one function that cache policies hang on. Where the cache is plain and nobody looks, the attention runs in there too and
a step is one call. Numbers are those of :class:`~workers.mechanisms.lean.LeanLayer` up to the order of sums, each row by itself.

Shapes: B batch, T new tokens, C hidden width, Hq query heads, H key-value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_double, c_int, c_long, c_void_p, pointer
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workers.mechanisms.attention import Forward, attend
from workers.mechanisms.lean_maps import Ends, Shape
from workers.mechanisms.lean_memory import Memories, is_row
from workers.mechanisms.native import kernels
from workers.mechanisms.packed_rows import ROWS

if TYPE_CHECKING:
    from workers.mechanisms.lean import LeanLayer, Rotary, RotaryTable

NAME = "native::linear_rows"  # what a profiler sees
ARGUMENTS = {"between": "ppppppnppi", "through": "pnpppppnpi", "step": "pnpppppnpi"}  # pointers, numbers, threads
MISTAKES: dict[int, tuple[type[Exception], str]] = {  # why a call did nothing
    1: (MemoryError, "there is no room to work in"),
    2: (IndexError, "a token id is not in the vocabulary of the model"),
    3: (IndexError, "a token stands beyond the positions that were computed"),
}


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
        if not (b * t <= ROWS and cosines.numel() == b * t * width and all(map(is_row, (hidden, cosines, sines)))):
            for layer in self.layers:
                hidden = layer(hidden, rotary, forward)
            return hidden
        turns = (cosines.data_ptr(), sines.data_ptr(), b * t)
        if self.is_whole(forward, b, t):
            out = torch.empty_like(hidden)
            self.run(call_through, forward, hidden.data_ptr(), *turns, out.data_ptr())
            return out
        heads = hidden.new_empty(b, t, sum(self.sizes), width)
        call_between(None, self.at[0], None, hidden.data_ptr(), *turns, None, heads.data_ptr())
        for at, following, layer in zip(self.at, [*self.at[1:], None], self.layers, strict=True):
            query, key, value = heads.transpose(1, 2).split_with_sizes(self.sizes, 1)
            mixed = attend(forward, layer.index, query, key, value, layer.scaling, layer.window).contiguous()
            out, heads = torch.empty_like(hidden), torch.empty_like(heads)
            call_between(at, following, mixed.data_ptr(), hidden.data_ptr(), *turns, out.data_ptr(), heads.data_ptr())
            hidden = out
        return hidden

    def is_whole(self, forward: Forward, rows: int, new: int) -> bool:
        """True if all layers may run in one call (:meth:`run`): one new token a row, that nobody looks at, over a plain cache."""
        if new != 1 or not self.alike or not is_unwatched(forward):
            return False
        self.remembered = [forward.cache.layers[index] for index in self.indices]
        self.memories = Memories.of(self.remembered, (rows, self.sizes[1], self.layers[0].width), self.memories)
        return self.memories is not None

    def run(self, call: Callable[..., None], forward: Forward, *arguments: Any) -> None:
        """All layers in one call, once :meth:`is_whole` said so; the cache learns of its new entries afterwards."""
        memories: Any = self.memories
        call(self.pointers, len(self.layers), memories.heads, self.scales, *arguments)
        memories.wrote(self.remembered, forward)


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
        if b * t > ROWS or not is_row(hidden):
            return None
        logits = hidden.new_empty(b, t, self.shape.qkv.n)
        call_between(None, self.at, None, hidden.data_ptr(), None, None, b * t, None, logits.data_ptr())
        return logits


class LeanStep:
    """A whole step in one call: token ids [B, 1] -> logits [B, 1, V].

    Args:
        rows: all layers of the model.
        ends: what stands before and behind them.
        rotary: the angles.
    """

    def __init__(self, rows: LeanRows, ends: Ends, rotary: RotaryTable):
        self.rows, self.ends, self.rotary, self.at = rows, ends, rotary, byref(ends)

    def __call__(self, ids: Tensor, forward: Forward) -> Tensor | None:
        """None where it takes more than one call.

        Raises:
            IndexError: an id is not of the vocabulary, or a position not below ``forward.seen``.
        """
        (b, t), positions = ids.shape, forward.positions
        if b > ROWS or positions.shape != ids.shape or not all(map(_is_numbers, (ids, positions))):
            return None
        if not self.rows.is_whole(forward, b, t):
            return None
        if self.ends.positions < forward.seen:
            self.ends.turn_by(*self.rotary.table(forward.seen))
        logits = torch.empty(b, 1, self.ends.head.qkv.n, dtype=torch.float32)
        self.rows.run(call_step, forward, self.at, ids.data_ptr(), positions.data_ptr(), b, logits.data_ptr())
        return logits


def _is_numbers(x: Tensor) -> bool:
    return x.dtype == torch.int64 and x.is_contiguous()


def call_between(*arguments: Any) -> None:
    """``between`` of lean_rows.c, seen by a profiler.

    Raises:
        MemoryError: there is no room to work in.
    """
    if torch.autograd._profiler_enabled():
        with torch.autograd.profiler.record_function(NAME):
            _call("between", arguments)
    else:
        _call("between", arguments)


def call_through(*arguments: Any) -> None:
    """``through`` of lean_rows.c.

    Raises:
        MemoryError: there is no room to work in.
    """
    _call("through", arguments)


def call_step(*arguments: Any) -> None:
    """``step`` of lean_rows.c.

    Raises:
        MemoryError: there is no room to work in.
        IndexError: a token id or a position is out of range.
    """
    _call("step", arguments)


def _call(name: str, arguments: tuple[Any, ...]) -> None:
    failed = _function(name)(*arguments, torch.get_num_threads())
    if failed:
        kind, why = MISTAKES[failed]
        raise kind(why)


def knows_width(width: int) -> bool:
    """True if the kernel has an attention for heads of this width."""
    library: Any = kernels().library
    return bool(library.knows_width(c_long(width)))


@cache
def _function(name: str) -> Any:
    run = getattr(kernels().library, name)
    run.argtypes = [{"p": c_void_p, "n": c_long, "i": c_int}[kind] for kind in ARGUMENTS[name]]
    return run
