"""Prompt lookup decoding."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from studio_state.catalog import Card
from workers.mechanisms.speculation import DRAFTS, lookup, speculating
from workers.methods import Policy, card, knob
from workers.session import Session


class PromptLookup(Policy):
    """Guess the next tokens from an earlier occurrence of the newest ones; check all guesses in one pass.

    Saxena 2023, "Prompt Lookup Decoding" (no paper; the idea of speculative decoding is Leviathan et al.
    2022, arXiv:2211.17192). The text equals plain decoding, greedy or sampled with the same seed, up to the
    rounding of a forward of several tokens against one of a single token: exact in float32. Deviation: the
    latest occurrence is taken, not the first, because nearby repetition is more alike.
    """

    card: ClassVar[Card] = card(
        id="prompt-lookup",
        title="Prompt lookup",
        paper="Saxena 2023, Prompt Lookup Decoding",
        **DRAFTS,
    )
    draft: int = knob(
        8, ge=0, le=64, help="tokens guessed at once; more = fewer passes where text repeats, more wasted work elsewhere"
    )
    ngram: int = knob(3, ge=1, le=16, help="longest run of newest tokens that is looked up; shorter runs are tried after it")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Take over the decode loop."""
        if self.is_neutral:
            return nullcontext()
        return speculating(session, self.card.id, lambda history: lookup(history, self.ngram, self.draft))
