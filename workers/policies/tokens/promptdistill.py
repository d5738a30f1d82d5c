"""PromptDistill."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, ClassVar

from pydantic import ValidationInfo, field_validator
from torch import Tensor

from studio_state.catalog import Card
from studio_state.errors import SpecError
from studio_state.resources import Use
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.cache import PADDING
from workers.mechanisms.last_query import last_query_logits, most_asked_for
from workers.mechanisms.selection_stages import evenly, given_depths, given_shares, held_share
from workers.mechanisms.token_selection import narrowing, truncating
from workers.methods import Policy, card, knob
from workers.session import Session

SEVERAL = "Several stages"  # heading of the knobs that one stage does not need


class PromptDistill(Policy):
    """Let only the prompt tokens that the last one asks for travel through the later layers.

    Jin et al. 2025, arXiv:2503.23274: the first layers read the whole prompt; then the raw logits of the last token's
    query, averaged over heads and smoothed by pooling, choose the tokens whose hidden states go on, at their original
    positions. Where there are several stages, each chooses among what the one before it left. Deviations: numbers of
    tokens and of layers are shares, so one setting fits every model; unless given one by one, stages lie evenly from
    the first one on and reach ``keep`` by equal factors. The last token always goes on, beside the share.
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
            Use(resource="kv.uniform", mode="spoils", when={"stages": [2, 3], "truncate_stages": [1]}),
            Use(resource="kv.uniform", mode="spoils", when={"stages": [3], "truncate_stages": [2]}),
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
    stages: int = knob(1, ge=1, le=3, group=SEVERAL, help="how many times tokens are chosen; more = gentler, slower")
    depths: str = knob(
        "", max_length=100, group=SEVERAL, help="depth of each stage, for example 0.3, 0.6; empty = evenly from depth to the end"
    )
    keeps: str = knob(
        "", max_length=100, group=SEVERAL, help="share of the prompt left by each stage, for example 0.5, 0.2; empty = by keep"
    )
    truncate_stages: int = knob(
        0,
        ge=0,
        le=3,
        group=SEVERAL,
        help="of truncate: only the first so many stages cut, to what the last of them leaves; 0 = all",
    )

    @field_validator("depths", "keeps")
    @classmethod
    def _are_of_the_stages(cls, value: str, info: ValidationInfo) -> str:
        try:
            if value:
                (given_depths if info.field_name == "depths" else given_shares)(value, info.data.get("stages", 1))
        except SpecError as e:
            raise ValueError(str(e)) from e
        return value

    def plan(self) -> tuple[list[float], list[float]]:
        """Depth of each stage, and the share of the prompt that it leaves."""
        depths, shares = evenly(self.stages, self.keep, self.depth)
        return (
            given_depths(self.depths, self.stages) if self.depths else depths,
            given_shares(self.keeps, self.stages) if self.keeps else shares,
        )

    def selecting_layers(self, layers: int) -> dict[int, float]:
        """Index of each layer that chooses -> share of the prompt that it leaves; at least one layer stays behind the last."""
        return {max(1, min(layers - 1, round(d * layers))) - 1: share for d, share in zip(*self.plan(), strict=True)}

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Choose in the last layer before each stage; narrow everything behind it."""
        stack, before = ExitStack(), 0.0
        choosing = self.selecting_layers(session.info.layers)
        for layer, share in choosing.items():
            select = partial(self.select, share=share / before if before else share, first=not before)
            stack.enter_context(narrowing(session, self.card.id, layer, select))
            before = share
        if self.truncate:
            stack.enter_context(truncating(session, list(choosing)[: self.truncate_stages or None][-1]))
        return stack

    def select(self, call: AttentionCall, share: float, first: bool) -> Tensor | None:
        """Tokens that go on [B, n]: per row the best of its own length, and its last token.

        Args:
            share: of the prompt, or of what an earlier stage left of it.
            first: there is no earlier stage.
        """
        real = call.forward.positions_at(call.layer) != PADDING
        counts = (share * (real.sum(1).double() - (0 if first else 1))).round().long()
        return most_asked_for(last_query_logits(call), real, counts, self.kernel, own=False)

    def kv_factor(self) -> float:
        """Layers hold what the stages before them left; with truncation the early ones hold less."""
        return held_share(*self.plan(), cut=(self.truncate_stages or self.stages) if self.truncate else 0)
