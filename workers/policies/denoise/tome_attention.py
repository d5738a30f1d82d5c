"""Token merging in a denoiser."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.denoising import denoising
from workers.mechanisms.merged_attention import Grid, match_to, merging, targets_of
from workers.mechanisms.token_merging import Matching
from workers.methods import Policy, card, knob
from workers.session import Session


class ToMeAttention(Policy):
    """Merge the tokens that are most alike before self-attention, and copy the result to all of them behind it.

    Bolya & Hoffman 2023, "Token Merging for Fast Stable Diffusion", arXiv:2303.17604: one token of each 2 x 2 cell,
    drawn anew at every step and the same for both halves of guidance, takes in the tokens most like it; a merged token
    is the mean and counts once in attention. Only blocks at the largest resolution merge, unless ``min_tokens`` says
    otherwise. Deviations: tokens are compared as attention gets them, behind its norm, where the authors compare the
    block's input; the draw depends on the step alone, so that every picture of a seed is the same.
    """

    card: ClassVar[Card] = card(
        id="tome-attention",
        title="ToMe for diffusion",
        paper="arXiv:2303.17604",
        stage="denoise",
        families=("diffusion",),
        not_traits=("joint-attention",),
        workloads=("generate-images",),
        owns=("denoise.attention",),
        effects={"merged_tokens": "up"},
        hopes={"seconds_per_image": "down"},
        neutral={"keep": 1.0},
    )
    keep: float = knob(0.5, ge=0.25, le=1.0, help="share of tokens that attend; lower = faster, blurs what is alike")
    min_tokens: int = knob(
        0, ge=0, le=1_000_000, help="blocks with fewer tokens stay whole; 0 = only those with the most tokens of the model merge"
    )

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Merge in every self-attention that is large enough."""
        if self.is_neutral:
            return nullcontext()
        return merging(session, lambda tokens, grid: self._pairs(session, tokens, grid))

    def _pairs(self, session: Session, tokens: Tensor, grid: Grid) -> Matching | None:
        """Which of [B, T, C] become one, counted."""
        state, count = denoising(session), tokens.shape[1]
        most: dict[str, int] = state.keep((ToMeAttention, "most"), lambda: {"tokens": 0})
        most["tokens"] = max(most["tokens"], count)  # the first attention of a UNet is among its largest
        matching = None
        if count >= (self.min_tokens or most["tokens"]):
            matching = match_to(tokens, targets_of(grid, state.step), count - max(1, round(self.keep * count)))
        merged = count - matching.left if matching else 0
        told: list[int] = state.keep((ToMeAttention, "merged"), list)
        told.append(merged)
        session.counts["merged_tokens"] = sum(told) / len(told)
        if merged:
            session.did(self.card.id, merged)
        return matching if merged else None

    def why_idle(self, session: Session) -> str:
        """No self-attention was large enough for these knobs."""
        return (
            f"{self.card.title} merged nothing: no self-attention has {max(self.min_tokens, 2)} tokens "
            f"of which {self.keep:g} is less than all; lower min_tokens or keep"
        )
