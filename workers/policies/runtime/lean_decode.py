"""Lean decode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import Forward
from workers.mechanisms.cache import StudioCache
from workers.mechanisms.lean import LeanModel
from workers.methods import Policy, card
from workers.session import Session


class LeanDecode(Policy):
    """Run decode steps with fused projections, a preallocated cache and none of the library's per-step Python.

    Folklore of inference engines (gpt-fast, vLLM): queries, keys and values come from one product, gate and
    up from another, rotary angles from a table, and new keys and values are written into room reserved
    before the first step. On a CPU plain weights are multiplied by oneDNN, which reads them faster than the
    BLAS behind the library's linear layers on some processors; layers whose weights are packed in 4 or 8 bits
    run in one native call from attention to attention where it can be compiled (AVX-512 VNNI), and a whole step
    in one where the cache is plain and nobody looks at the attention. The mathematics stays the library's; sums
    may be ordered differently.
    """

    card: ClassVar[Card] = card(
        id="lean-decode",
        title="Lean decode",
        stage="runtime",
        families=("llm", "vlm"),
        traits=("lean-shape",),
        owns=("runtime.step",),
        effects={"weight_bytes": "same", "kv_bytes": "same"},
        hopes={"decode_tokens_per_s": "up"},
        neutral={},
        alters_weights=True,
    )

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Take over the decode path; the fused weights stand in for their parts everywhere."""
        return self._stepping(session)

    @contextmanager
    def _stepping(self, session: Session) -> Iterator[None]:
        lean = LeanModel(session)

        def step(ids: Tensor, forward: Forward) -> Tensor:
            session.did(self.card.id, lean.lean_layers)
            return lean.step(ids, forward)

        with session.swapped(lean.swaps), session.having(step_forward=step), session.hooked(session.before_decode, make_room):
            yield


def make_room(cache: StudioCache, new_tokens: int) -> None:
    """Reserve what the decode steps will append: every new token but the last one, which nobody reads."""
    cache.reserve(new_tokens - 1)
