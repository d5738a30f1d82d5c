"""StreamingLLM."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import budgets, evicting, keep_best
from workers.methods import Policy, card, knob
from workers.session import Session


class StreamingLLM(Policy):
    """Keep the first tokens (attention sinks) and a sliding window of the newest; the cache never grows.

    Xiao et al. 2023, arXiv:2309.17453, section 3: without the first few positions, on which every head
    parks attention, a window alone breaks down. Deviations: the window is a share of the prompt, so
    lanes compare at equal budgets; kept entries stay at their place in the text (the paper renumbers them
    to stream past the trained context).
    """

    card: ClassVar[Card] = card(
        id="streamingllm",
        title="StreamingLLM",
        paper="arXiv:2309.17453",
        stage="kv",
        families=("llm", "vlm"),
        owns=("kv.length",),
        spoils=("kv.rollback",),
        effects={"kept_prompt_tokens": "down", "prefill_kv_bytes": "down", "kv_bytes": "down", "cached_tokens": "down"},
        hopes={"decode_tokens_per_s": "up"},
        neutral={"keep": 1.0},
    )
    keep: float = knob(0.5, ge=0.01, le=1.0, help="size of the cache as a share of the prompt, sinks included; 1 = never evict")
    sinks: int = knob(4, ge=0, le=256, help="first positions that always stay; 0 shows why they are needed")
    every: int = knob(
        1, ge=1, le=256, help="slide the window every so many new tokens; more = less work, a slightly longer cache"
    )

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Cut to sinks and window at the end of the prefill and while decoding."""
        if self.is_neutral:
            return nullcontext()
        return evicting(session, self.card.id, self.choose, self.every)

    def choose(self, call: AttentionCall) -> Tensor | None:
        """Entries to keep [B, H, n] of one layer: newer is better, sinks are best."""
        b, heads, s = call.query.shape[0], call.cache.group.stop, call.cache.group.store.length
        age = torch.arange(s, device=call.query.device, dtype=torch.float32).expand(b, heads, s)
        return keep_best(call, age, budgets(call, self.keep, self.sinks + 1), sinks=self.sinks)

    def kv_factor(self) -> float:
        """The share kept."""
        return self.keep
