"""KIVI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Literal

from studio_state.catalog import Card
from studio_state.errors import SpecError
from workers.mechanisms.attention import Forward
from workers.mechanisms.cache import StudioCache
from workers.mechanisms.quantized_cache import QuantizedStore
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
        return self._packing(session)

    @contextmanager
    def _packing(self, session: Session) -> Iterator[None]:
        with session.hooked(session.storage, self._pack(session)), session.hooked(session.after_step, self._account(session)):
            yield

    def _pack(self, session: Session) -> Any:
        account = self._account(session)

        def pack(cache: StudioCache, forward: Forward) -> None:
            for layer in cache.layers:
                for group in layer.groups:
                    keys, values = group.store.read()
                    self._check(keys.shape[-1], values.shape[-1])
                    group.store = QuantizedStore(keys, values, self.bits, self.group_size, self.residual)
            account(cache, forward)

        return pack

    def _check(self, *widths: int) -> None:
        for width in widths:
            if width * self.bits % 8:
                raise SpecError(f"kivi: bits = {self.bits} does not fill whole bytes at head width {width}; set bits = 8")

    def _account(self, session: Session) -> Any:
        def account(cache: StudioCache, forward: Forward) -> None:
            share = quantized_share(cache)
            session.counts["quantized_kv_share"] = share
            if share:
                session.did(self.card.id, share)

        return account

    def kv_factor(self) -> float:
        """Code and scale bits over the 32 or 16 of the float cache, as an upper bound."""
        return min(1.0, (self.bits + 32 / self.group_size) / 16)


def quantized_share(cache: StudioCache) -> float:
    """Share of the stored entries that are packed."""
    stores = [(g.store, g.stop - g.start) for layer in cache.layers for g in layer.groups]
    packed = sum(s.packed * heads for s, heads in stores if isinstance(s, QuantizedStore))
    return packed / max(1, sum(s.length * heads for s, heads in stores))
