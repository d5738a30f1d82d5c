"""What every head of a cache holds at some moments of a generation, small enough to send.

Looking happens between the timed steps.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from studio_state.events import CacheFrame
from workers.families.batches import State

MOST_BITS = 4_000_000  # of one frame: beyond that the eviction map by layer has to do
MOMENTS = 4  # frames while decoding, evenly spaced, the last at the end


def is_whole(state: State) -> bool:
    """True if nothing was evicted so far."""
    return all(g.store.length == layer.seen for layer in state.cache.kv_layers for g in layer.groups)


def is_moment(new: int, limit: int) -> bool:
    """Whether to look after so many of ``limit`` new tokens."""
    return any(new == max(2, round(limit * k / MOMENTS)) for k in range(1, MOMENTS + 1))


def heads_of(state: State) -> list[int]:
    """KV heads of each layer that keeps keys and values."""
    return [layer.heads for layer in state.cache.kv_layers]


def frames_of(state: State, lengths: Sequence[int], new: int) -> list[CacheFrame]:
    """One frame a row; none if it would be too large.

    Args:
        lengths: prompt tokens of each row as they were given, dropped image tokens included.
        new: tokens decided so far.
    """
    seen = state.cache.seen
    frames = []
    for row, length in enumerate(lengths):
        origin = state.origin[row] if state.origin else list(range(state.lengths[row]))
        columns = length + max(0, seen - max(state.lengths))  # those of the prompt, then those that were generated and cached
        if columns * sum(heads_of(state)) > MOST_BITS:
            return []
        frames.append(CacheFrame(after=new, positions=columns, held=_packed(_bits(state, row, origin, length, columns))))
    return frames


def _bits(state: State, row: int, origin: Sequence[int], length: int, columns: int) -> NDArray[np.bool_]:
    """Which head holds which position: [heads of all layers, columns]."""
    place = np.concatenate((np.asarray(origin, dtype=np.int64), np.arange(length, max(length, columns))))
    rows, device = [], torch.device("cpu")
    for layer in state.cache.kv_layers:
        for g in layer.groups:
            held = g.logical(len(state.lengths), device)[row].cpu().numpy()  # [1 or heads, S]
            for head in range(g.stop - g.start):
                positions = held[head if len(held) > 1 else 0]
                bits = np.zeros(columns, dtype=bool)
                bits[place[positions[(positions >= 0) & (positions < len(place))]]] = True
                rows.append(bits)
    return np.stack(rows) if rows else np.zeros((0, columns), dtype=bool)


def _packed(bits: NDArray[np.bool_]) -> str:
    """Rows padded to whole bytes, highest bit first, as base64."""
    return base64.b64encode(np.packbits(bits, axis=1).tobytes()).decode("ascii")
