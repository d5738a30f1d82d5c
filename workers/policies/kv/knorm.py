"""L2-norm eviction (KNorm)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import budgets, evicting, keep_best
from workers.methods import Policy, card, knob
from workers.session import Session


class KNorm(Policy):
    """Keep the cached positions whose keys are shortest.

    Devoto et al. 2024, arXiv:2406.11430: the L2 norm of a cached key tells, without any attention score,
    how much attention it will draw; short keys draw most. Like the paper's rule it protects nothing by
    default; ``recent`` guards the newest positions, ``skip_layers`` leaves the first layers whole (the
    paper's language-modelling runs skip 2). Deviation: it acts once, at the end of the prefill.
    """

    card: ClassVar[Card] = card(
        id="knorm",
        title="L2-norm eviction",
        paper="arXiv:2406.11430",
        stage="kv",
        families=("llm", "vlm"),
        owns=("kv.length",),
        needs=("attention.scores",),
        spoils=("kv.rollback", "kv.uniform"),
        effects={"kept_prompt_tokens": "down", "prefill_kv_bytes": "down"},
        hopes={"decode_tokens_per_s": "up"},
        neutral={"keep": 1.0},
    )
    keep: float = knob(0.5, ge=0.01, le=1.0, help="share of prompt positions kept; lower = smaller and faster, worse recall")
    recent: int = knob(0, ge=0, le=512, help="newest positions that always stay; 0 as in the paper")
    skip_layers: int = knob(0, ge=0, le=256, fits="layers", help="first layers that keep everything; more = safer, less saved")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Evict in every layer at the end of the prefill."""
        return evicting(session, self.card.id, self.choose)

    def choose(self, call: AttentionCall) -> Tensor | None:
        """Entries to keep [B, H, n] of one layer."""
        if call.layer < self.skip_layers:
            return None
        shortness = -call.keys.float().norm(dim=-1)
        recent = min(self.recent, call.forward.prompt_tokens)
        return keep_best(call, shortness, budgets(call, self.keep, recent), recent=recent)

    def kv_factor(self) -> float:
        """The share kept; layers left whole are not known here, so an upper bound with them."""
        return 1.0 if self.skip_layers else self.keep
