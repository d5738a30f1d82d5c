"""CaM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

from torch import Tensor

from studio_state.catalog import Card
from studio_state.resources import Use
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.cache import PADDING
from workers.mechanisms.draws import position_draws
from workers.mechanisms.eviction import Guarded, Kept, When, newness, per_kv_head
from workers.mechanisms.evictor import EVICTS
from workers.mechanisms.gathered_attention import GatheredAttention
from workers.mechanisms.kv_store import gather_entries
from workers.mechanisms.merging import Following, Parting
from workers.methods import card, knob
from workers.session import Session


class CaM(GatheredAttention):
    """Add the values of evicted positions to the next few that stay, where attention says that they would be missed.

    Zhang et al., ICML 2024, PMLR 235: of an evicted position the key is dropped; its value is added in equal parts to
    the next ``merge_budget`` kept ones with a probability of its attention over their mean, so that what attention
    pays to them makes up for what it no longer finds. Which positions stay is another method's choice: StreamingLLM's
    or H2O's. What leaves at the end of the prompt is dropped, as in the released code: hundreds of values added to a
    few drown them (``merge_prompt`` shows it). Deviations: attention is that of the newest ``window`` queries, for
    each position the mean of those that could see it (the paper sums over the answer so far; sums over a prompt would
    favour early positions, which more queries see); the query heads of one KV head are averaged, and every KV head
    evicts for itself; evictions come at the end of the prompt and every ``every`` tokens instead of one by one. Draws
    follow from the experiment's seed, the layer, the head and the position, so a run can be repeated.
    """

    card: ClassVar[Card] = card(
        id="cam",
        title="CaM",
        paper="Zhang et al. 2024, CaM: Cache Merging for Memory-efficient LLMs Inference",
        **EVICTS | {"effects": EVICTS["effects"] | {"kv_bytes": "down", "cached_tokens": "down"}},
        edits=("kv.values",),
        # merged values are written in full precision, so nobody may have packed the cache by then
        uses=(Use(resource="kv.dtype", mode="edits", when={"when": ["decode", "both"]}),),
    )
    keep: float = knob(0.5, ge=0.01, le=1.0, help="size of the cache as a share of the prompt; 1 = never evict")
    when: When = knob("both", help="both = at the end of the prompt and while answering; or one of the two")
    choice: Literal["recency", "attention"] = knob(
        "recency", help="what stays: recency = the first and the newest, as StreamingLLM; attention = as H2O"
    )
    sinks: int = knob(4, ge=0, le=256, help="of recency: first positions that always stay")
    recent: float = knob(0.5, ge=0.0, le=1.0, help="of attention: share of the budget for the newest positions")
    merge_budget: int = knob(32, ge=1, le=512, help="kept positions that share an evicted value; more = spread thinner")
    window: int = knob(32, ge=1, le=512, help="newest queries whose attention says what would be missed")
    merge_prompt: bool = knob(False, help="also merge what leaves at the end of the prompt, instead of dropping it")

    @contextmanager
    def _evicting(self, session: Session) -> Iterator[None]:
        with session.remembering(self.window, on=self.when != "prefill"), super()._evicting(session):
            yield

    def add(self, call: AttentionCall) -> None:
        """Sums are needed for one of the choices only."""
        if self.choice == "attention":
            super().add(call)

    def scores(self, call: AttentionCall) -> Tensor:
        """How new each entry is, or the attention it gathered: [B, H, S]."""
        if self.choice == "attention":
            return super().scores(call)
        return newness(call)[:, None].expand(-1, call.cache.heads, -1)

    def guarded(self, call: AttentionCall) -> Guarded:
        """What always stays by either choice."""
        return super().guarded(call) if self.choice == "attention" else Guarded(recent=1, sinks=self.sinks)

    def attention(self, call: AttentionCall) -> Tensor:
        """Mean attention to each entry by those of the newest queries that see it: [B, H, S]."""
        held, queries = call.held, call.newest_queries(self.window)
        at = call.newest_positions(queries.shape[2])[:, None, :, None]  # [B, 1, w, 1]
        paid = per_kv_head((call.probabilities(queries) * (at != PADDING)).sum(2), call.cache.heads)
        return paid / (held.places()[:, :, None] <= at).sum(2).clamp_min(1)

    def fold(self, session: Session, call: AttentionCall, kept: Kept) -> tuple[Tensor, Tensor] | None:
        """Keys stay as they are; values get those that leave, where the draw says so."""
        if call.forward.phase == "prefill" and not self.merge_prompt:
            return None
        held, parting = call.held, Parting.of(call.held, kept)
        following = Following.of(parting, self.merge_budget)
        places = held.places().expand(*parting.leaving.shape[:2], -1).gather(2, parting.leaving.clamp_min(0))
        goes = position_draws(places, session.spec.seed, call.layer) < following.ratio(self.attention(call))
        return gather_entries(held.keys, parting.staying.clamp_min(0)), following.spread(held.values, goes)
