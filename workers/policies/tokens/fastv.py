"""FastV."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.token_selection import narrowing
from workers.mechanisms.visual_tokens import rank_levels
from workers.methods import Policy, card, knob
from workers.session import Session


class FastV(Policy):
    """Behind an early layer of the language model, let only the image tokens go on that the last token attends to.

    Chen et al. 2024, arXiv:2403.06764, section 4: after layer K the image tokens with the least attention leave, by
    the attention of the prompt's last token in that layer, mean over heads, as in the released code (the paper's text
    takes the mean over all tokens). Tokens keep their positions; the first K layers keep all keys and values.
    """

    card: ClassVar[Card] = card(
        id="fastv",
        title="FastV",
        paper="arXiv:2403.06764",
        stage="tokens",
        families=("vlm",),
        owns=("tokens.prompt",),
        needs=("prefill.whole", "attention.scores"),
        spoils=("kv.uniform",),
        effects={"kept_prompt_tokens": "down", "prefill_kv_bytes": "down"},
        hopes={"ttft_s": "down"},
        neutral={"keep": 1.0},
        max_batch=1,
    )
    keep: float = knob(0.5, ge=0.01, le=1.0, help="share of image tokens that go on behind the layer; lower = faster, sees less")
    layer: int = knob(2, ge=1, le=200, fits="layers", help="so many layers see all image tokens; more = safer, slower")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Choose in the last of the early layers."""
        return narrowing(session, self.card.id, self.layer - 1, partial(self.select, session))

    def select(self, session: Session, call: AttentionCall) -> Tensor | None:
        """Tokens that go on [1, n]: all words, and the image tokens with most attention from the last token."""
        image = call.forward.image_tokens
        if image is None or not bool(image.any()):
            return None
        places = image[0].nonzero()[:, 0]
        attention = call.probabilities(call.query[:, :, -1:])[0, :, 0].mean(0)  # [L]
        order = attention[places].sort(descending=True, stable=True).indices
        if session.seen and session.seen[0].entered:
            record = session.seen[0]
            record.level = rank_levels([record.entered[i] for i in order.tolist()], len(record.share), self.keep)
            record.rank = None
        count = max(1, round(self.keep * len(places)))
        if count >= len(places):
            return None
        words = (~image[0]).nonzero()[:, 0]
        return torch.cat([words, places[order[:count]]]).sort().values[None]

    def why_idle(self, session: Session) -> str:
        """Text prompts hold nothing for it."""
        return f"{self.card.title} changed nothing: no prompt held an image, or the share leaves all of its tokens"
