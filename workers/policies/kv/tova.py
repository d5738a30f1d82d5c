"""TOVA."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import When
from workers.mechanisms.evictor import EVICTS
from workers.mechanisms.shared_choice import SharedChoice
from workers.methods import card, knob


class TOVA(SharedChoice):
    """Drop the positions that the newest token attends to least, while reading the prompt and at every new token.

    Oren et al. 2024, Token Omission Via Attention, arXiv:2401.06104: only the newest query counts, its
    attention is averaged over all query heads of a layer, and all heads of the layer keep the same positions. Nothing
    is protected, the newest token itself neither. Deviations: the size of the cache is a share of the prompt; the prompt
    is cut back once, at its end, by its last token (the paper's language-modelling runs drop one position a token from
    the start: that is ``between_chunks`` with chunks of one token).
    """

    card: ClassVar[Card] = card(
        id="tova",
        title="TOVA",
        paper="arXiv:2401.06104",
        **EVICTS | {"effects": EVICTS["effects"] | {"kv_bytes": "down", "cached_tokens": "down"}},
    )
    keep: float = knob(0.5, ge=0.01, le=1.0, help="size of the cache as a share of the prompt; 1 = never evict")
    when: When = knob("both", help="both = at the end of the prompt and while answering; or one of the two")
    every: int = knob(1, ge=1, le=256, help="evict every so many new tokens; more = less work, a slightly longer cache")

    def scores(self, call: AttentionCall) -> Tensor:
        """Attention of the newest query [B, S], mean over all query heads."""
        return call.probabilities(call.query[:, :, -1:])[:, :, 0].mean(1)
