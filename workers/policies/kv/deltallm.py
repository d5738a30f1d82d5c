"""DeltaLLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.cache import StudioCache
from workers.mechanisms.reference_keys import ReferenceAttention
from workers.methods import Policy, card, knob
from workers.session import Session

SKIPPED = "skipped_macs"


class DeltaLLM(Policy):
    """Let older keys change only where they differ enough from the key before them, and skip the multiply-adds of the rest.

    DeltaLLM, arXiv:2507.19608 (2025), as far as its abstract tells: temporal sparsity of keys for distant positions,
    full attention in a window of the newest ones. Each KV head has a reference key, which takes over those numbers of a
    new key that are at least ``alpha`` times the head's root mean square away from it; a query's product with it follows
    from the one before by what changed. The first ``sinks`` keys stay as they are. No source of the method was at hand:
    threshold, window and sinks are our reading, and their values those that were good on a small model.

    It counts multiply-adds and saves no time: products are taken in dense form here, and a prompt takes longer. Older keys
    are replaced by references in place, so bytes stay what they were; stored as differences they would be fewer.
    """

    card: ClassVar[Card] = card(
        id="deltallm",
        title="DeltaLLM",
        paper="arXiv:2507.19608",
        stage="kv",
        families=("llm", "vlm"),
        owns=("kv.values",),
        edits=("kv.dtype", "attention.pattern"),  # keys are written in full precision; attention itself is computed here
        needs=("prefill.whole", "attention.scores"),  # the threshold is of the whole prompt
        spoils=("kv.rollback",),
        effects={SKIPPED: "up"},
        neutral={"alpha": 0.0},
    )
    alpha: float = knob(
        0.5, ge=0.0, le=4.0, help="change that counts, in units of a head's typical key number; more = more skipped, worse"
    )
    window: int = knob(32, ge=1, le=4096, help="newest keys that a query sees as they are; more = better, less skipped")
    sinks: int = knob(4, ge=0, le=256, help="first keys that stay as they are")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Compute the attention of every layer in the prompt and in the answer."""
        return nullcontext() if self.is_neutral else self._attending(session)

    @contextmanager
    def _attending(self, session: Session) -> Iterator[None]:
        work = ReferenceAttention(self.alpha, self.window, self.sinks)

        def attend(call: AttentionCall) -> Tensor | None:
            if SKIPPED not in session.counts:  # a new run
                session.counts[SKIPPED], work.needed, work.taken = 0.0, 0.0, 0.0
            return work(call)

        def tell(cache: StudioCache, forward: Forward) -> None:
            needed, taken = float(work.needed), float(work.taken)
            session.counts[SKIPPED] = skipped = 1 - taken / needed if needed else 0.0
            if skipped:
                session.did(self.card.id, skipped)

        told = session.hooked(session.after_prefill, tell), session.hooked(session.after_step, tell)
        with session.having(attending=attend), told[0], told[1]:
            yield

    def why_idle(self, session: Session) -> str:
        """Only keys outside of the window count."""
        return f"{self.card.title} skipped nothing: no text was longer than the window, or every number changed"
