"""The base of policies that evict cached positions: the budget and its knobs, the same for every way of scoring.

Shapes: B batch, H KV heads, S stored entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

from pydantic import field_validator
from torch import Tensor

from studio_state.errors import SpecError
from studio_state.resources import Use
from workers.cards import knob
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import FREE, Guarded, Kept, When, budgets, evicting, keep_best, keep_best_of_all
from workers.mechanisms.layer_budgets import Rule, layer_shares, relative
from workers.methods import Policy
from workers.session import Session

Heads = Literal["uniform", "adaptive"]
SHARED = "When, and how layers and heads share the budget"  # heading of the knobs that all evictors have
EVICTS: dict[str, Any] = {
    "stage": "kv",
    "families": ("llm", "vlm"),
    "owns": ("kv.length",),
    "needs": ("attention.scores",),
    "spoils": ("kv.rollback", "kv.uniform"),
    "effects": {"kept_prompt_tokens": "down", "prefill_kv_bytes": "down"},
    "hopes": {"decode_tokens_per_s": "up"},
    "neutral": {"keep": 1.0},
}  # what the cards of evictors have in common
UNEVEN = Use(resource="kv.uniform", mode="spoils", when={"layers": ["pyramid", "given"]})
SAME_EVERYWHERE: dict[str, Any] = EVICTS | {
    "spoils": ("kv.rollback",),
    "uses": (UNEVEN,),
}  # of those that keep the same in all layers


class Budgeted(Policy):
    """How much of the prompt stays in the cache, when it is cut back to that, and how the layers share it."""

    keep: float = knob(0.5, ge=0.01, le=1.0, help="share of prompt positions kept; lower = smaller and faster, worse recall")
    when: When = knob(
        "prefill", group=SHARED, help="prefill = evict at the end of the prompt; decode = while answering; both = then and there"
    )
    every: int = knob(
        16, ge=1, le=256, group=SHARED, help="while answering, evict every so many new tokens; more = less work, a longer cache"
    )
    between_chunks: bool = knob(
        False,
        group=SHARED,
        help="where the prompt comes in chunks, evict after each of them: less memory at the peak, scores from what is left",
    )
    layers: Rule = knob(
        "uniform", group=SHARED, help="uniform = all layers keep as much; pyramid = the first ones more; given = as you say"
    )
    slope: float = knob(
        20.0, ge=1.0, le=100.0, group=SHARED, help="of the pyramid: the last layer keeps 1 / slope of the mean; 1 = uniform"
    )
    layer_shares: str = knob(
        "2, 1", max_length=400, group=SHARED, help="of given: relative budgets, first layer to last; two numbers = a line"
    )

    @field_validator("layer_shares")
    @classmethod
    def _are_numbers(cls, value: str) -> str:
        try:
            relative(value)
        except SpecError as e:
            raise ValueError(str(e)) from e
        return value

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Evict in every layer, whenever it is time."""
        return nullcontext() if self.is_neutral else self._evicting(session)

    @contextmanager
    def _evicting(self, session: Session) -> Iterator[None]:
        fold = partial(self.fold, session)
        with evicting(session, self.card.id, self.choose, self.when, self.every, self.between_chunks, fold):
            yield

    def choose(self, call: AttentionCall) -> Kept | None:
        """Entries of one layer to keep, ascending: [B, H, n], or [B, n] a head; None = all."""
        raise NotImplementedError

    def fold(self, session: Session, call: AttentionCall, kept: Kept) -> tuple[Tensor, Tensor] | None:
        """Keys and values [B, H, n, D] that the kept entries get from those that leave; None = they stay as they are."""
        return None

    def counts(self, call: AttentionCall, guarded: Guarded = FREE) -> list[int]:
        """Entries that this layer keeps in each row, at least the guarded ones.

        Layers that differ share what the guarded entries, which all of them keep, leave of the budget, so that together
        they keep no more than equal ones.
        """
        if self.layers == "uniform":
            return budgets(call, self.keep, guarded)
        lengths, counts = call.forward.prompt_lengths, []
        for n, recent in zip(lengths, guarded.newest(len(lengths)), strict=True):
            fixed = min(n, recent + guarded.sinks)
            others = n - fixed
            share = self.share(call, max(0.0, self.keep * n - fixed) / others) if others else 0.0
            counts.append(max(1, fixed + round(share * others)))
        return counts

    def share(self, call: AttentionCall, keep: float | None = None) -> float:
        """Share of the prompt that this layer keeps, where all together keep the share ``keep``; None = that of the knob."""
        keep = self.keep if keep is None else keep
        if self.layers == "uniform":
            return keep
        cache = call.forward.cache
        order = [layer for layer, memory in enumerate(cache.layers) if memory.keeps_kv]
        return layer_shares(keep, len(order), self.layers, self.slope, self.layer_shares)[order.index(call.layer)]

    def kv_factor(self) -> float:
        """The share kept."""
        return self.keep if self.when != "decode" else 1.0


def heads_knob(default: Heads, group: str | None = SHARED) -> Any:
    """How the heads of a layer share its budget."""
    about = "uniform = every head of a layer keeps as much; adaptive = heads with higher scores keep more"
    return knob(default, group=group, help=about)


def safeguard_knob(default: float) -> Any:
    """What of the budget is dealt out equally, where heads share by score."""
    about = "of adaptive: this share of the budget is dealt out equally, the rest by score; 1 = uniform"
    return knob(default, ge=0.0, le=1.0, group=SHARED, help=about)


class Evictor(Budgeted):
    """Keeps the positions with the best scores; heads may share a layer's budget by one ranking over all of them."""

    heads: Heads = heads_knob("uniform")
    safeguard: float = safeguard_knob(0.2)

    def scores(self, call: AttentionCall) -> Tensor | None:
        """How much each stored entry of one layer is worth [B, H, S], higher = keep; None = this layer keeps all."""
        raise NotImplementedError

    def guarded(self, call: AttentionCall) -> Guarded:
        """What always stays."""
        return FREE

    def choose(self, call: AttentionCall) -> Kept | None:
        """The best by score, within the budget."""
        scores = self.scores(call)
        return None if scores is None else self.best(call, scores)

    def best(self, call: AttentionCall, scores: Tensor) -> Kept | None:
        """The best by these scores [B, H, S], within the budget; None = all."""
        guarded = self.guarded(call)
        counts = self.counts(call, guarded)
        if self.heads == "adaptive":
            return keep_best_of_all(call, scores, counts, guarded, self.safeguard)
        return keep_best(call, scores, counts, guarded.recent, guarded.sinks)


class QueryEvictor(Evictor):
    """Scores positions by the attention of the newest queries, which every layer therefore remembers."""

    window: int = knob(32, ge=1, le=512, help="last prompt tokens whose attention votes; they always stay")

    @contextmanager
    def _evicting(self, session: Session) -> Iterator[None]:
        with session.remembering(self.window, on=self.when != "prefill"), super()._evicting(session):
            yield

    def guarded(self, call: AttentionCall) -> Guarded:
        """The window that votes."""
        return voters(call, self.window)


def voters(call: AttentionCall, window: int) -> Guarded:
    """The entries of the newest ``window`` queries, which vote and stay."""
    return Guarded(recent=min(call.newest_queries(window).shape[2], call.held.keys.shape[2]))
