"""CurDKV."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import Guarded
from workers.mechanisms.evictor import EVICTS, Evictor
from workers.mechanisms.sketch import sketched
from workers.methods import card, knob


class CUR(Evictor):
    """Keep the cached positions whose keys and values together stand out most among their neighbours.

    Sengupta et al. 2025, arXiv:2509.15038 (CurDKV): a CUR decomposition rebuilds a matrix from those of its own rows
    that have most leverage; taken of the keys and of the values, that keeps the attention's output, not only its
    weights. An entry's leverage is approximated by its squared length, of keys and values, as a share of its window's,
    and the two are multiplied. No query is needed, and every KV head chooses for itself. The first ``sinks``
    positions stay.

    As in kvpress nothing is projected by default (``sketch`` = 20 is the authors' Gaussian projection). Deviations:
    shares are taken of the window's mean instead of its sum, which orders full windows alike; by sums the entries of
    the last window, which is seldom full, would all but always stay (in the authors' own code those of the first one).
    """

    card: ClassVar[Card] = card(id="cur", title="CurDKV", paper="arXiv:2509.15038", **EVICTS)
    leverage: Literal["product", "mean", "value", "key"] = knob(
        "product", help="what an entry counts by: its key and its value multiplied, their mean, or one of them"
    )
    local_window: int = knob(16, ge=0, le=4096, help="entries that are compared with each other; 0 = all of them")
    sketch: int = knob(
        0, ge=0, le=512, help="columns that keys and values are projected to first; fewer = coarser; 0 = not at all"
    )
    sinks: int = knob(4, ge=0, le=256, help="first positions that always stay")

    def scores(self, call: AttentionCall) -> Tensor:
        """Leverage of keys and values [B, H, S], which sums to 1 in every head."""
        held = call.held
        shape = held.keys.shape[:3]
        real = torch.ones(shape, dtype=torch.bool, device=held.keys.device) if held.real is None else held.real.expand(shape)
        key, value = (self.of(x, real) for x in (held.keys, held.values))
        worth = {"product": key * value, "mean": (key + value) / 2, "value": value, "key": key}[self.leverage]
        return worth / worth.sum(-1, keepdim=True).clamp_min(torch.finfo(worth.dtype).tiny)

    def of(self, x: Tensor, real: Tensor) -> Tensor:
        """Squared lengths of keys or values [B, H, S, D] over the mean of their window: [B, H, S]; padding has 0."""
        size = sketched(x.float(), self.sketch).square().sum(-1) * real
        window = (real.cumsum(-1) - 1).clamp_min(0) // (self.local_window or real.shape[-1])
        zero = size.new_zeros(*size.shape[:2], int(window.max()) + 1)
        total, count = zero.scatter_add(2, window, size), zero.scatter_add(2, window, real.to(size.dtype))
        mean = (total / count.clamp_min(1)).clamp_min(torch.finfo(size.dtype).tiny)
        return size / mean.gather(2, window)

    def guarded(self, call: AttentionCall) -> Guarded:
        """The sinks."""
        return Guarded(sinks=self.sinks)
