"""Weights in large pages: the same numbers and bytes in one piece of memory, and the old piece let go."""

from __future__ import annotations

import gc
import mmap
import weakref

import torch
from torch import nn

from workers.mechanisms.large_pages import move_together
from workers.mechanisms.lean_maps import gather, packed_maps
from workers.mechanisms.packed_linear import Int4Linear, Int8Linear
from workers.mechanisms.rounded_input import RoundedInput


def test_moved_weights_are_the_same_and_lie_in_order() -> None:
    maps = [
        Int4Linear.of(nn.Linear(96, 130), 32),
        Int8Linear.of(nn.Linear(64, 7)),
        Int4Linear.of(nn.Linear(64, 64, bias=False), 64),
    ]
    x, before = [torch.randn(3, m.in_features) for m in maps], [m.nbytes() for m in maps]
    wanted = [m(part) for m, part in zip(maps, x, strict=True)]
    matrices = [m.matrix() for m in maps]
    gather(maps)
    places = [t.data_ptr() for m in maps for name, t in m.named_buffers() if name != "bias"]
    if hasattr(mmap, "MADV_HUGEPAGE"):  # else they stay where they are
        assert places == sorted(places)
        assert places[-1] - places[0] < sum(before) + 64 * len(places)
        assert all(place % 64 == 0 for place in places)
    assert [m.nbytes() for m in maps] == before
    for m, matrix, part, y in zip(maps, matrices, x, wanted, strict=True):
        assert torch.equal(m.matrix(), matrix)
        assert torch.equal(m(part), y)


def test_nothing_holds_the_old_memory() -> None:
    maps = [RoundedInput(Int4Linear.of(nn.Linear(64, 64), 32)), Int8Linear.of(nn.Linear(64, 64))]
    for m in maps:
        m(torch.randn(1, 64))
    found = packed_maps([*maps, nn.Linear(3, 3)])
    old = [weakref.ref(t) for m in found for name, t in m.named_buffers() if name != "bias"]
    gather(found)
    gc.collect()
    assert all(ref() is None for ref in old)


def test_no_modules_no_memory() -> None:
    assert move_together([]) == 0
    assert move_together([nn.ReLU()]) == 0
