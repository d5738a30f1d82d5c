"""L2-norm eviction (KNorm)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import Guarded
from workers.mechanisms.evictor import EVICTS, Evictor
from workers.methods import card, knob


class KNorm(Evictor):
    """Keep the cached positions whose keys are shortest.

    Devoto et al. 2024, arXiv:2406.11430: the L2 norm of a cached key tells, without any attention score,
    how much attention it will draw; short keys draw most. Like the paper's rule it protects nothing by
    default; ``recent`` guards the newest positions, ``skip_layers`` leaves the first layers whole (the
    paper's language-modelling runs skip 2). Deviation: by default it acts once, at the end of the prefill.
    """

    card: ClassVar[Card] = card(id="knorm", title="L2-norm eviction", paper="arXiv:2406.11430", **EVICTS)
    recent: int = knob(0, ge=0, le=512, help="newest positions that always stay; 0 as in the paper")
    skip_layers: int = knob(0, ge=0, le=256, fits="layers", help="first layers that keep everything; more = safer, less saved")

    def scores(self, call: AttentionCall) -> Tensor | None:
        """How short the keys are [B, H, S]."""
        return None if call.layer < self.skip_layers else -call.keys.float().norm(dim=-1)

    def guarded(self, call: AttentionCall) -> Guarded:
        """The newest positions, as many as the prompt has."""
        return Guarded(recent=min(self.recent, call.forward.prompt_tokens))

    def kv_factor(self) -> float:
        """The share kept; layers left whole are not known here, so an upper bound with them."""
        return 1.0 if self.skip_layers else super().kv_factor()
