"""Speculative decoding with a draft model."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, ClassVar

from studio_state.catalog import Card
from workers.mechanisms.drafting import DraftModel, FirstLayers, SmallModel, load_draft
from workers.mechanisms.speculation import DRAFTS, drafting
from workers.methods import Policy, card, knob
from workers.session import Session


class Speculative(Policy):
    """Let a small model guess the next tokens; check all guesses in one pass of the large one.

    Leviathan et al. 2022, arXiv:2211.17192, section 2; Chen et al. 2023, arXiv:2302.01318, algorithm 2. Deviation: the
    papers keep a guess with probability min(1, p / q), else draw again from what p has over q; the output then has
    the distribution of plain decoding. Here the model draws as in plain decoding, with the same random numbers, and a
    guess is kept if it equals the draw. When sampling fewer guesses are kept that way, but the output *is* that of
    plain decoding with the same seed, up to the rounding of a forward of several tokens: exact in float32, but not where
    activations are quantized, whose scales depend on the tokens of a forward.

    Without a draft model the model's own first layers guess, with its final norm and head (early exit, after LayerSkip,
    Elhoushi et al. 2024, arXiv:2404.16710, section 4.3; deviations: no training, so that few layers guess badly, and
    the check runs these layers again). They read the model's own cache, an image in it included. A draft model sees no
    image, only the words (as in Gagrani et al. 2024, arXiv:2404.08856). It reads the prompt in the first decode step;
    its weights and its cache count as the lane's.
    """

    card: ClassVar[Card] = card(
        id="speculative",
        title="Speculative decoding",
        paper="arXiv:2211.17192",
        **DRAFTS,
    )
    draft_model: str = knob(
        "",
        max_length=4096,
        format="path",
        help="a smaller model with the same vocabulary that guesses: zoo id, Hub id or folder; empty = the model's own first layers",
    )
    layers: int = knob(
        0,
        ge=0,
        le=200,
        fits="layers",
        help="first layers that guess where there is no draft model; more = better guesses, slower; 0 = half of them",
    )
    draft: int = knob(
        4, ge=0, le=64, help="tokens guessed at once; more = fewer passes where guesses are good, more wasted work elsewhere"
    )
    min_confidence: float = knob(
        0.0,
        ge=0.0,
        le=1.0,
        help="stop guessing where the likeliest guess has a smaller probability; more = fewer wasted guesses; 0 = never",
    )

    def prepare(self, session: Session) -> None:
        """Load the draft model."""
        if self.companion():
            self._loaded(session)

    def companion(self) -> str:
        """The draft model."""
        return "" if self.is_neutral else self.draft_model

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Take over the decode loop."""
        if self.is_neutral:
            return nullcontext()
        if not self.draft_model:
            layers = self.layers or max(1, session.info.layers // 2)
            begin = partial(FirstLayers, layers=layers, count=self.draft, min_confidence=self.min_confidence)
            return drafting(session, self.card.id, begin)
        small, stack = self._loaded(session), ExitStack()
        stack.enter_context(session.hooked(session.companions, small.model))
        reader = partial(SmallModel, draft=small, count=self.draft, min_confidence=self.min_confidence)
        stack.enter_context(drafting(session, self.card.id, reader))
        return stack

    def _loaded(self, session: Session) -> DraftModel:
        """The draft model, loaded once per experiment, for all lanes that name it."""
        small: DraftModel = session.once((DraftModel, self.draft_model), lambda: load_draft(session, self.draft_model))
        return small

    def why_idle(self, session: Session) -> str:
        """Why nothing was guessed."""
        return f"{self.card.title} guessed nothing; the texts are longer than the draft model's context, or min_confidence is too high"
