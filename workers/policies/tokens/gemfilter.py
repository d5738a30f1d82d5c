"""GemFilter."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.early_reading import reading_early
from workers.mechanisms.last_query import last_query_logits, most_asked_for
from workers.methods import Policy, card, knob
from workers.session import Session


class GemFilter(Policy):
    """Read the prompt with the first layers, then let the whole model read only the tokens that the last one asks for.

    Shi et al. 2024, arXiv:2409.17422, algorithm 1: in an early layer the raw logits of the last token's query, summed
    over heads and smoothed by pooling, choose tokens; the model then reads these as if they were the prompt, from its
    first layer and with positions counted anew. Deviations: numbers of tokens and of layers are shares, so one setting
    fits every model; the last token is always read, beside the share (the paper leaves it to the scores, and would
    answer behind another token where they drop it). Models that count image positions in three directions (Qwen2.5-VL)
    keep the positions that the tokens had, as where image tokens are dropped.
    """

    card: ClassVar[Card] = card(
        id="gemfilter",
        title="GemFilter",
        paper="arXiv:2409.17422",
        stage="tokens",
        families=("llm", "vlm"),
        owns=("tokens.prompt",),
        needs=("attention.scores",),
        effects={"kept_prompt_tokens": "down", "prefill_kv_bytes": "down"},
        hopes={"ttft_s": "down", "decode_tokens_per_s": "up"},
        neutral={"keep": 1.0},
    )
    keep: float = knob(0.5, ge=0.01, le=1.0, help="share of prompt tokens that are read again; lower = faster, worse recall")
    depth: float = knob(
        0.43, ge=0.0, le=1.0, help="share of the layers that read the whole prompt first; the last of them chooses"
    )
    kernel: int = knob(5, ge=1, le=63, help="width of the smoothing, odd; wider keeps whole phrases, 1 = none")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Read every prompt twice: early, and what is left of it in full."""
        if self.is_neutral:
            return nullcontext()
        return reading_early(session, self.card.id, max(1, round(self.depth * session.info.layers)), self.select)

    def select(self, call: AttentionCall, real: Tensor) -> Tensor | None:
        """Columns [B, n] of the tokens to read: per row the best of its own length, and its last token."""
        counts = (self.keep * real.sum(1).double()).round().long()  # of the tokens before the last one
        return most_asked_for(last_query_logits(call), real, counts, self.kernel, own=True)

    def kv_factor(self) -> float:
        """The share that is read again."""
        return self.keep
