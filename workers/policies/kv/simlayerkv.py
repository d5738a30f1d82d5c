"""SimLayerKV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall, Forward, InPrompts
from workers.mechanisms.cache import PADDING, KVLayer, StudioCache
from workers.mechanisms.evictor import EVICTS
from workers.mechanisms.ranking import best_of_real
from workers.methods import Policy, card, knob
from workers.session import Session


class SimLayerKV(Policy):
    """Cut lazy layers back to the first and the newest positions; let all others keep everything.

    Zhang et al. 2024, arXiv:2410.13846: a layer is lazy if the last ``window`` queries of the prompt pay more than
    ``threshold`` of their attention, mean over all query heads, to the first ``sinks`` and the newest positions; how
    lazy a layer is hardly changes while answering. Which layers are lazy is found out for each prompt alone, and a lazy
    one is cut back once, at the end of the prompt. So what is saved depends on model and text, not on a budget.

    Deviations: the newest positions are a share of the prompt (the paper keeps 1,024 of many thousands), and the last 32
    queries are asked; ``window`` = 1 comes near to the released code, which asks the first token of the answer. The
    laziest ``lazy_layers`` are cut back below the threshold too, so that every model shows what that costs; 0 is the
    paper's rule. Thresholds of the released code: 0.9 for Llama 3, 0.85 for Qwen, 0.8 for Mistral, 0.65 for Llama 2.
    """

    card: ClassVar[Card] = card(
        id="simlayerkv",
        title="SimLayerKV",
        paper="arXiv:2410.13846",
        **EVICTS | {"neutral": {"threshold": 1.0, "lazy_layers": 0}},
    )
    threshold: float = knob(
        0.9, ge=0.0, le=1.0, help="a layer with more of its attention on what would stay is lazy; lower = smaller, worse recall"
    )
    recent: float = knob(0.25, ge=0.0, le=1.0, help="newest positions that a lazy layer keeps, as a share of the prompt")
    sinks: int = knob(4, ge=0, le=256, help="first positions that a lazy layer keeps")
    window: int = knob(32, ge=1, le=512, help="last prompt tokens whose attention tells how lazy a layer is")
    lazy_layers: int = knob(
        1,
        ge=0,
        le=256,
        fits="layers",
        help="so many layers, the laziest, are cut back whatever the threshold; 0 = only beyond it",
    )

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Look at every layer at the end of the prompt, then cut the lazy ones back."""
        return nullcontext() if self.is_neutral else self._cutting(session)

    @contextmanager
    def _cutting(self, session: Session) -> Iterator[None]:
        shares: dict[int, Tensor] = {}

        def look(call: AttentionCall) -> None:
            if call.forward.ends_prefill:
                shares[call.layer] = self.share(call)

        def cut(cache: StudioCache, forward: Forward) -> None:
            for number, lazy in zip(shares, self.lazy(torch.stack(list(shares.values()))), strict=True):
                dropped = self.cut_back(cache.layers[number], forward, lazy)
                if dropped:
                    session.did(self.card.id, dropped)
            shares.clear()

        looks, cuts = session.hooked(session.observers, InPrompts(look)), session.hooked(session.after_prefill, cut)
        with session.remembering(self.window), looks, cuts:
            yield

    def share(self, call: AttentionCall) -> Tensor:
        """Share of their attention that the newest queries pay to what would stay of the layer: [B]."""
        query = call.newest_queries(self.window)
        counted = (call.newest_positions(query.shape[2]) != PADDING)[:, None]  # [B, 1, w]
        probs = call.probabilities(query)  # [B, Hq, w, S]
        stays = self.stays(call.cache, call.forward).repeat_interleave(probs.shape[1] // call.cache.heads, 1)
        paid = (probs * stays[:, :, None]).sum(-1) * counted
        return paid.sum((1, 2)) / (counted.sum((1, 2)) * probs.shape[1])

    def stays(self, memory: KVLayer, forward: Forward) -> Tensor:
        """Which entries a lazy layer keeps: bool [B, H, S]."""
        held = memory.held()
        lengths = torch.tensor(forward.prompt_lengths, device=held.keys.device)[:, None, None]
        places = held.places().expand(held.keys.shape[:3])
        newest = (lengths * self.recent).round().clamp_min(1)
        return (places != PADDING) & ((places < self.sinks) | (places >= lengths - newest))

    def lazy(self, shares: Tensor) -> Tensor:
        """Which layers are lazy for which row [layers, B], by the shares [layers, B]."""
        rank = shares.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
        return (shares > self.threshold) | (rank < self.lazy_layers)

    def cut_back(self, memory: KVLayer, forward: Forward, lazy: Tensor) -> float:
        """Cut a layer back in the rows where it is lazy [B]: entries that leave, mean over rows and heads."""
        stays, held = self.stays(memory, forward), memory.held()
        real = torch.ones_like(stays) if held.real is None else held.real.expand_as(stays)
        kept = real & (stays | ~lazy[:, None, None])
        dropped = float((real & ~kept).sum()) / (stays.shape[0] * stays.shape[1])
        if dropped:
            memory.keep(best_of_real(kept.float(), real, kept.sum(-1).amax(1)))
        return dropped

    def why_idle(self, session: Session) -> str:
        """No layer was lazy."""
        return (
            f"{self.card.title} changed nothing: no layer paid more than threshold = {self.threshold} of its attention to the first "
            f"{self.sinks} and the newest {self.recent:.0%} of the positions; lower threshold, or raise lazy_layers above 0"
        )
