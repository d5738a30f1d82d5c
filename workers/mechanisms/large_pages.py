"""Packed weights one after the other in large pages of memory.

A decode step reads every weight once, in one order. Where they lie scattered over pages of 4 KB, a processor also has to look up
the place of each page. Moved into one piece of memory, for which the system is asked for pages of 2 MB (``MADV_HUGEPAGE``, which it
may ignore), they take less time to read. What is in them, and how many bytes they count, stays the same.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_PAGE, _LINE = 2 << 20, 64  # bytes of a large page and of a cache line


def move_together(modules: Iterable[nn.Module]) -> int:
    """Move the buffers of CPU modules, in their order, into one piece of memory; each module keeps its own tensors.

    Biases stay where they are: they are small, and what stands in front of a map may hold its bias too.

    Returns:
        Bytes moved; 0 where the system knows no such pages.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    held = [
        (m, name, t)
        for m in modules
        for name, t in m._buffers.items()
        if name != "bias" and t is not None and t.is_cpu and t.numel()
    ]
    sizes = [-(-t.nbytes // _LINE) * _LINE for _, _, t in held]
    if advice is None or not held:
        return 0
    memory = mmap.mmap(-1, sum(sizes) + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(advice)
    at = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % _PAGE
    for i, size in enumerate(sizes):
        module, name, tensor = held[i]
        module._buffers[name] = _copied(tensor, memory, at)
        del tensor
        held[i] = (module, name, module._buffers[name])  # the old one is free before the next is moved
        at += size
    return sum(sizes)


def _copied(tensor: Tensor, memory: mmap.mmap, at: int) -> Tensor:
    """The tensor in this memory, which lives as long as it."""
    return torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=at).view(tensor.shape).copy_(tensor)
