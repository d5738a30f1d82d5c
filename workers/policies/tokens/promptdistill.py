"""PromptDistill."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from studio_state.catalog import Card
from studio_state.resources import Use
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.cache import PADDING
from workers.mechanisms.ranking import best_of_real
from workers.mechanisms.token_selection import narrowing, truncating
from workers.methods import Policy, card, knob
from workers.session import Session


class PromptDistill(Policy):
    """Let only the prompt tokens that the last one asks for travel through the later layers.

    Jin et al. 2025, arXiv:2503.23274: the first layers read the whole prompt; then the raw
    logits of the last token's query, averaged over heads and smoothed by pooling, choose the tokens whose
    hidden states go on, at their original positions. Deviations: one selection stage (the paper also tries
    several); number of tokens and of early layers are shares, so one setting fits every model.
    """

    card: ClassVar[Card] = card(
        id="promptdistill",
        title="PromptDistill",
        paper="arXiv:2503.23274",
        stage="tokens",
        families=("llm", "vlm"),
        owns=("tokens.prompt",),
        needs=("prefill.whole", "attention.scores"),
        uses=(
            Use(resource="kv.length", mode="owns", when={"truncate": [True]}),
            Use(resource="kv.uniform", mode="spoils", when={"truncate": [False]}),
        ),
        effects={"kept_prompt_tokens": "down", "prefill_kv_bytes": "down"},
        hopes={"ttft_s": "down"},
        neutral={"keep": 1.0},
    )
    keep: float = knob(
        0.25, ge=0.01, le=1.0, help="share of prompt tokens that reach the later layers; lower = faster, worse recall"
    )
    depth: float = knob(0.43, ge=0.0, le=1.0, help="share of the layers that read the whole prompt; the last of them chooses")
    kernel: int = knob(5, ge=1, le=63, help="width of the smoothing, odd; wider keeps whole phrases, 1 = none")
    truncate: bool = knob(False, help="after the prefill, cut the early layers' cache to the same tokens; smaller, worse recall")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Choose in the last of the early layers; narrow everything behind it."""
        stack = ExitStack()
        layers = len(session.family.parts(session.model)["layers"])
        stack.enter_context(narrowing(session, self.card.id, self.selecting_layer(layers), self.select))
        if self.truncate:
            stack.enter_context(truncating(session))
        return stack

    def selecting_layer(self, layers: int) -> int:
        """Index of the last layer that reads the whole prompt; at least one layer stays behind it."""
        return max(1, min(layers - 1, round(self.depth * layers))) - 1

    def select(self, call: AttentionCall) -> Tensor | None:
        """Tokens that go on [B, n]: per row the best of its own length, and its last token."""
        real = call.forward.positions != PADDING
        lengths = real.sum(1)
        counts = (self.keep * lengths.double()).round().long()  # of the tokens before the last one
        if bool((counts >= lengths - 1).all()):
            return None
        scores = self.scores(call).masked_fill(~real, 0.0)
        scores[:, -1] = 0.0
        smooth = F.avg_pool1d(scores[:, None], self.kernel, 1, self.kernel // 2)[:, 0, : scores.shape[1]]
        smooth[:, -1] = float("inf")
        return best_of_real(smooth, real, torch.minimum(counts + 1, lengths))

    def scores(self, call: AttentionCall) -> Tensor:
        """Raw logits of the last token's query [B, L], mean over heads."""
        query, keys = call.query[:, :, -1].float(), call.keys.float()  # [B, Hq, D], [B, H, L, D]
        b, h, _, d = keys.shape
        logits = query.view(b, h, -1, d) @ keys.transpose(2, 3) * call.scaling
        return logits.flatten(1, 2).mean(1)

    def kv_factor(self) -> float:
        """Later layers hold the share kept; with truncation all of them do."""
        return self.keep if self.truncate else self.depth + (1 - self.depth) * self.keep
