"""StreamingLLM."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import Guarded, When, newness
from workers.mechanisms.evictor import EVICTS, SAME_EVERYWHERE
from workers.mechanisms.shared_choice import SharedChoice
from workers.methods import card, knob


class StreamingLLM(SharedChoice):
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
        **SAME_EVERYWHERE | {"needs": (), "effects": EVICTS["effects"] | {"kv_bytes": "down", "cached_tokens": "down"}},
    )
    keep: float = knob(0.5, ge=0.01, le=1.0, help="size of the cache as a share of the prompt, sinks included; 1 = never evict")
    when: When = knob("both", help="both = at the end of the prompt and while answering; or one of the two")
    every: int = knob(
        1, ge=1, le=256, help="slide the window every so many new tokens; more = less work, a slightly longer cache"
    )
    sinks: int = knob(4, ge=0, le=256, help="first positions that always stay; 0 shows why they are needed")

    def scores(self, call: AttentionCall) -> Tensor:
        """How new each entry is [B, S]."""
        return newness(call)

    def guarded(self, call: AttentionCall) -> Guarded:
        """The sinks and the newest entry."""
        return Guarded(recent=1, sinks=self.sinks)
