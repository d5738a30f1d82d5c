"""Innovation cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import Guarded, evicting_behind
from workers.mechanisms.evictor import SAME_EVERYWHERE
from workers.mechanisms.shared_choice import SharedChoice
from workers.mechanisms.surprise import noted_surprise, noting_surprise
from workers.methods import card, knob
from workers.session import Session


class InnovationCache(SharedChoice):
    """Keep the first tokens, the newest ones, and of the others those that surprised the model most.

    Inspired by Zancato et al. 2024, B'MOJO, arXiv:2407.06324, whose layers append to an exact memory the tokens that
    their state could not predict (innovation). This is not B'MOJO, which has to be trained: a token's innovation is here
    its negative log-likelihood by the model itself, given all tokens before it, for all layers and heads alike. It is
    known when the prompt has passed all layers, so eviction waits for that, and costs the output head on every prompt
    token. The first token counts as a guess among all tokens; image tokens, which have no likelihood, are ranked like
    words, evenly spread, so that about as large a share of them stays.
    """

    card: ClassVar[Card] = card(
        id="innovation-cache",
        title="Innovation cache (inspired by B'MOJO)",
        paper="arXiv:2407.06324",
        **SAME_EVERYWHERE
        | {"needs": ("kv.uniform",)},  # where only some tokens reach the last layer, the others have no likelihood
    )
    sinks: int = knob(4, ge=0, le=256, help="first positions that always stay")
    window: int = knob(32, ge=1, le=512, help="newest positions that always stay")

    @contextmanager
    def _evicting(self, session: Session) -> Iterator[None]:
        when = self.when, self.every, self.between_chunks
        with noting_surprise(session), evicting_behind(session, self.card.id, self.choose, *when):
            yield

    def scores(self, call: AttentionCall) -> Tensor:
        """Surprise of each entry [B, S]."""
        return noted_surprise(call)

    def guarded(self, call: AttentionCall) -> Guarded:
        """The first and the newest positions."""
        return Guarded(recent=min(self.window, call.held.keys.shape[2]), sinks=self.sinks)
