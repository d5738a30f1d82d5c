"""KIVI."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

from studio_state.catalog import Card
from workers.mechanisms.held import Held
from workers.mechanisms.quantized_cache import QuantizedStore, quantizing
from workers.methods import Policy, card, knob
from workers.session import Session


class Kivi(Policy):
    """Store older keys and values in 2, 4 or 8 bits, the newest ones in full precision.

    Liu et al. 2024, arXiv:2402.02750, section 3: keys are quantized per channel (their outliers stand in
    fixed channels), values per token, both asymmetric and in groups. Deviations: whole groups are packed
    as soon as ``residual`` newer tokens exist, for keys and values alike (the paper lets the keys' rest
    grow and empties it at once); value groups are the largest divisor of the head width that also divides
    ``group_size``; attention reads a dequantized copy, so bytes fall and time does not.
    """

    card: ClassVar[Card] = card(
        id="kivi",
        title="KIVI",
        paper="arXiv:2402.02750",
        stage="kv",
        families=("llm", "vlm"),
        owns=("kv.dtype",),
        spoils=("kv.rollback",),
        effects={"kv_bytes": "down", "prefill_kv_bytes": "down", "quantized_kv_share": "up"},
        not_neutral_because="every number of bits rounds; a test bounds the error of each element by half a step",
    )
    bits: Literal[2, 4, 8] = knob(4, help="bits per stored number; fewer = smaller and less exact")
    group_size: int = knob(
        32, ge=8, le=256, multiple_of=8, help="tokens that share a key scale; smaller = more exact, more scale bytes"
    )
    residual: int = knob(32, ge=0, le=1024, help="newest tokens that stay in full precision; more = more exact, more bytes")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Pack the cache once every evictor has acted on the prompt, then as it grows."""
        return quantizing(session, self.card.id, self.bits, self.pack)

    def pack(self, held: Held) -> QuantizedStore:
        """The store of one head group."""
        return QuantizedStore(held.keys, held.values, self.bits, self.group_size, self.residual)

    def kv_factor(self) -> float:
        """Code and scale bits over the 32 or 16 of the float cache, as an upper bound."""
        return min(1.0, (self.bits + 32 / self.group_size) / 16)
