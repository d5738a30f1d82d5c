"""Random eviction."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.draws import position_draws
from workers.mechanisms.eviction import Guarded
from workers.mechanisms.evictor import EVICTS, Evictor
from workers.methods import card, knob


class RandomKV(Evictor):
    """Keep cached positions drawn at random: what every cleverer choice has to beat.

    The control of papers on cache eviction; folklore. The draw of an entry follows from ``seed``, the layer, the KV head
    and its position alone, so a run can be repeated, a row of a batch keeps what it keeps alone, chunks change nothing,
    and what a smaller ``keep`` leaves is among what a larger one leaves. It protects nothing by default; ``sinks`` and
    ``recent`` guard what a rival guards, so that the two differ by the choice alone.
    """

    card: ClassVar[Card] = card(id="random-kv", title="Random eviction", **EVICTS | {"needs": ()})
    seed: int = knob(0, ge=0, le=2**31 - 1, help="of the draw; another seed keeps others")
    sinks: int = knob(0, ge=0, le=256, help="first positions that always stay; as many as the rival's for a fair race")
    recent: int = knob(0, ge=0, le=512, help="newest positions that always stay; as many as the rival's window for a fair race")

    def scores(self, call: AttentionCall) -> Tensor:
        """The draws [B, H, S], uniform in [0, 1)."""
        held, b = call.held, len(call.query)
        return position_draws(held.places().expand(b, call.cache.heads, -1), self.seed, call.layer)

    def guarded(self, call: AttentionCall) -> Guarded:
        """The first and the newest positions, as many as the prompt has."""
        return Guarded(recent=min(self.recent, call.forward.prompt_tokens), sinks=self.sinks)
