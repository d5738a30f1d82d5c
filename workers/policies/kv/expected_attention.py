"""Expected attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import ClassVar, NamedTuple

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall, InPrompts
from workers.mechanisms.eviction import Guarded
from workers.mechanisms.evictor import EVICTS
from workers.mechanisms.rotary import Rotary, UnturnedEvictor
from workers.methods import card, knob
from workers.session import Session

QUERIES = "queries"  # in KVLayer.notes: the moments of the queries so far


class Moments(NamedTuple):
    """How many queries there are [B], the sum [B, Hq, D] of what they were before rotary embedding, and that of their
    outer products [B, Hq, D, D]: float64."""

    number: Tensor
    total: Tensor
    products: Tensor

    @staticmethod
    def of(query: Tensor, counted: Tensor) -> Moments:
        """Of queries [B, Hq, T, D], those that count [B, T]."""
        query = query.double() * counted[:, None, :, None]
        return Moments(counted.sum(1), query.sum(2), query.transpose(2, 3) @ query)

    def plus(self, other: Moments) -> Moments:
        """Of both."""
        return Moments(self.number + other.number, self.total + other.total, self.products + other.products)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Mean [B, Hq, D] and covariance [B, Hq, D, D], both float32; 0 where there are no queries."""
        number = self.number.clamp_min(1)[:, None, None]
        mean = self.total / number
        return mean.float(), (self.products / number[..., None] - mean[..., :, None] * mean[..., None, :]).float()


class ExpectedAttention(UnturnedEvictor):
    """Keep the cached positions that the queries to come are expected to attend to.

    Devoto et al. 2025, arXiv:2510.00636: queries before rotary embedding are near to normally distributed. Their mean
    and covariance over the prompt are turned by the mean rotation of the next ``future`` positions; for a normal query,
    exp(q.k / sqrt d) has a closed expectation, exp(mean.k / sqrt d + k' covariance k / 2d). Scaled to sum to 1, averaged
    over the query heads of a KV head, plus ``epsilon``, times the length of the value, that is an entry's score. The
    first positions, where attention sinks, stay and are left out of all of it.

    As in kvpress the value's own length is taken (the paper's formula has it behind the output map). Deviations:
    ``future`` is 128 instead of 512, for answers to prompts of a few hundred tokens; the sums go on from chunk to chunk
    and, where evictions go on while answering (``when``), over the answer; a layer's sliding window, beyond which no
    later query looks, is not regarded.
    """

    card: ClassVar[Card] = card(
        id="expected-attention",
        title="Expected attention",
        paper="arXiv:2510.00636",
        traits=("rope",),
        **EVICTS | {"families": ("llm",)},
    )
    future: int = knob(128, ge=1, le=4096, help="how many positions ahead queries are expected; about as long as the answer")
    sinks: int = knob(4, ge=0, le=256, help="first positions, which always stay and whose queries do not count")
    covariance: bool = knob(True, help="regard how the queries vary; off = only their mean, cheaper")
    value_norm: bool = knob(True, help="weigh the expected attention by the length of the value; off = attention alone")
    epsilon: float = knob(
        0.0, ge=0.0, le=1.0, help="added to the expected attention before it is weighed; more = long values count more"
    )

    @contextmanager
    def _evicting_by(self, session: Session, rotary: Rotary) -> Iterator[None]:
        add = partial(self.add, rotary)
        with (
            session.hooked(session.observers, InPrompts(add) if self.when == "prefill" else add),
            super()._evicting_by(session, rotary),
        ):
            yield

    def add(self, rotary: Rotary, call: AttentionCall) -> None:
        """Add this call's queries to the layer's moments, as long as an eviction may still ask for them."""
        positions = call.forward.positions_at(call.layer)
        new = Moments.of(rotary.undo(call.query, positions[:, None], call.layer), positions >= self.sinks)
        before = call.cache.notes.get(QUERIES)
        call.cache.notes[QUERIES] = new if before is None else before.plus(new)

    def unturned_scores(self, rotary: Rotary, call: AttentionCall) -> Tensor:
        """Expected attention, weighed by the values [B, H, S]."""
        held, last = call.held, call.forward.positions_at(call.layer)[:, -1]
        keys = held.keys.float()[:, :, None]  # [B, H, 1, S, D]
        b, h, _, _, d = keys.shape
        mean, spread = call.cache.notes[QUERIES].mean_and_covariance()
        mean = rotary.ahead(mean[:, :, None], last, self.future, call.layer).view(b, h, -1, d, 1)
        logits = (keys @ mean)[..., 0] * call.scaling  # [B, H, G, S]
        if self.covariance:
            spread = rotary.ahead(spread, last, self.future, call.layer).transpose(2, 3)  # it is symmetric: first one side,
            spread = rotary.ahead(spread, last, self.future, call.layer).view(b, h, -1, d, d)  # then the other
            logits = logits + ((keys @ spread) * keys).sum(-1) * call.scaling**2 / 2
        counted = (held.places() >= self.sinks).expand(b, h, -1)  # neither sinks nor padding, which is below 0
        expected = logits.masked_fill(~counted[:, :, None], float("-inf")).softmax(-1).mean(2).masked_fill(~counted, 0.0)
        return (expected + self.epsilon) * held.values.float().norm(dim=-1) if self.value_norm else expected

    def guarded(self, call: AttentionCall) -> Guarded:
        """The sinks."""
        return Guarded(sinks=self.sinks)
