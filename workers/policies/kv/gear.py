"""GEAR."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch

from studio_state.catalog import Card
from workers.mechanisms.gear_store import GearStore
from workers.mechanisms.held import Held
from workers.mechanisms.quantized_cache import quantizing
from workers.methods import Policy, card, knob
from workers.session import Session


class Gear(Policy):
    """Store older keys and values in few bits, and mend them with a low-rank copy of the error and a few full numbers.

    Kang et al. 2024, arXiv:2403.05527, section 3: the largest and smallest numbers of every key channel and of every
    entry's values are kept in full, the rest is quantized as in KIVI (keys per channel, values per token), and what
    that misses is approximated per head by power iteration. Deviations: whole groups are packed as soon as ``residual``
    newer tokens exist, each such block with outliers and a basis of its own (the paper's buffer holds 20 tokens, and
    what is generated gets half the rank); an outlier is read as it was, with no low-rank part added to it, in the
    model's number format (factors have 16 bits). Numbers of outliers are rounded: short vectors have none. The released
    simulation counts levels as bits² - 1, which is right for 2 and 4 bits only, and one of its paths never puts the
    key outliers back; neither is followed. Attention reads a restored copy, so bytes fall and time does not.
    """

    card: ClassVar[Card] = card(
        id="gear",
        title="GEAR",
        paper="arXiv:2403.05527",
        stage="kv",
        families=("llm", "vlm"),
        owns=("kv.dtype",),
        spoils=("kv.rollback",),
        effects={"kv_bytes": "down", "prefill_kv_bytes": "down", "quantized_kv_share": "up"},
        neutral={"outliers": 1.0},
    )
    bits: Literal[2, 4, 8] = knob(2, help="bits per stored number; fewer = smaller and less exact")
    rank: int = knob(4, ge=0, le=256, help="rank of the copy of the error, per head; more = more exact, more bytes; 0 = none")
    outliers: float = knob(
        0.02,
        ge=0.0,
        le=1.0,
        help="share of numbers kept in full, the largest and the smallest; 1 = nothing is packed",
    )
    group_size: int = knob(
        32, ge=8, le=256, multiple_of=8, help="tokens that share a key scale; smaller = more exact, more scale bytes"
    )
    residual: int = knob(32, ge=0, le=1024, help="newest tokens that stay in full precision; more = more exact, more bytes")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Pack the cache once every evictor has acted on the prompt, then as it grows."""
        return nullcontext() if self.is_neutral else quantizing(session, self.card.id, self.bits, self.pack)

    def pack(self, held: Held) -> GearStore:
        """The store of one head group; padding, which nobody reads, becomes the mean entry, so that it is no outlier."""
        keys, values = held.keys, held.values
        if held.real is not None:
            real = held.real.unsqueeze(-1)
            count = real.sum(2, keepdim=True).clamp_min(1)
            keys, values = (torch.where(real, x, (x * real).sum(2, keepdim=True) / count) for x in (keys, values))
        return GearStore(keys, values, self.bits, self.group_size, self.residual, self.rank, self.outliers)

    def kv_factor(self) -> float:
        """Codes, scales and outliers (a number and its place) over the 16 bits of the float cache; factors not counted."""
        return min(1.0, (self.bits + 32 / self.group_size + 48 * self.outliers) / 16)
