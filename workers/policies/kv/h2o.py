"""H2O."""

from __future__ import annotations

from typing import ClassVar

from studio_state.catalog import Card
from workers.mechanisms.eviction import When
from workers.mechanisms.evictor import EVICTS
from workers.mechanisms.gathered_attention import GatheredAttention
from workers.methods import card, knob


class H2O(GatheredAttention):
    """Keep the positions that gathered most attention so far (heavy hitters) and the newest ones.

    Zhang et al. 2023, arXiv:2306.14048, section 4: every query, of the prompt and of decoding, adds its
    attention to the positions it looks at; half of the budget goes to the largest sums, half to the newest
    positions. Deviations: the query heads of one KV head are averaged (the paper's models have no grouped
    queries), and while decoding it evicts every ``every`` tokens instead of at each.
    """

    card: ClassVar[Card] = card(
        id="h2o",
        title="H2O",
        paper="arXiv:2306.14048",
        **EVICTS | {"effects": EVICTS["effects"] | {"kv_bytes": "down", "cached_tokens": "down"}},
    )
    keep: float = knob(0.5, ge=0.01, le=1.0, help="size of the cache as a share of the prompt; 1 = never evict")
    when: When = knob("both", help="both = at the end of the prompt and while answering; or one of the two")
    every: int = knob(8, ge=1, le=256, help="evict every so many new tokens; more = less work, a slightly longer cache")
