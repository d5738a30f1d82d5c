"""Leverage scores."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import Guarded
from workers.mechanisms.evictor import EVICTS
from workers.mechanisms.rotary import Rotary, UnturnedEvictor
from workers.mechanisms.sketch import sketched
from workers.methods import card, knob

DECIMALS = 4  # of the logarithm: equal tokens have equal keys in the first layer, up to rounding, which must not decide
NEWER = 1e-10  # a position: orders equal scores only


class LeverageScore(UnturnedEvictor):
    """Keep the cached positions whose keys the others' keys can least make up for.

    Chari and Van Durme 2025, arXiv:2507.08143 (Compactor), the geometric half of its score: X holds the keys of a KV
    head before rotary embedding, less their mean, projected to ``sketch`` columns by a Gaussian matrix; an entry's
    score is its leverage, its place on the diagonal of X (X'X)^-1 X'. No query is needed, and every KV head chooses for
    itself. As in Compactor the first ``sinks`` and the newest ``recent`` positions stay.

    A sketch no narrower than the head takes nothing away: leverages are exact then. As in kvpress a little is added to
    the diagonal of X'X, so that a prompt of fewer tokens than columns can be scored; here it is the share ``ridge`` of
    the mean of that diagonal (kvpress adds 0.01 whatever the scale of the keys). Deviations: the matrix is drawn once,
    with a fixed seed, for all heads and layers; equal scores, which repeated words have in the first layer, go by
    newness (kvpress leaves them to rounding).
    """

    card: ClassVar[Card] = card(
        id="leverage-score",
        title="Leverage scores",
        paper="arXiv:2507.08143",
        traits=("rope",),
        **EVICTS | {"families": ("llm",)},
    )
    sketch: int = knob(48, ge=0, le=512, help="columns the keys are projected to; fewer = faster, coarser; 0 = exact")
    ridge: float = knob(1e-3, ge=0.0, le=1.0, help="steadies the scores of short prompts; more = nearer to the keys' lengths")
    sinks: int = knob(8, ge=0, le=256, help="first positions that always stay")
    recent: int = knob(4, ge=0, le=512, help="newest positions that always stay")

    def unturned_scores(self, rotary: Rotary, call: AttentionCall) -> Tensor:
        """Logarithm of the leverage [B, H, S] (float64), equal ones in the order of the text."""
        held, places = call.held, call.held.places()
        keys = rotary.undo(held.keys, places, call.layer).double()
        real = torch.ones_like(keys[..., 0]) if held.real is None else held.real.expand(keys.shape[:3]).double()
        worth = leverage(sketched(keys, self.sketch), real, self.ridge)
        return worth.clamp_min(1e-30).log().round(decimals=DECIMALS) + NEWER * places

    def guarded(self, call: AttentionCall) -> Guarded:
        """The first and the newest positions, as many as the prompt has."""
        return Guarded(recent=min(self.recent, call.forward.prompt_tokens), sinks=self.sinks)


def leverage(x: Tensor, real: Tensor, ridge: float) -> Tensor:
    """Leverage [..., S] of the rows of x [..., S, k] (float64) among those that are real [..., S], their mean taken away.

    Args:
        ridge: what is added to the diagonal of x'x, as a share of the mean of that diagonal.
    """
    real = real[..., None]
    x = (x - (x * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True).clamp_min(1)) * real
    values, vectors = torch.linalg.eigh(x.transpose(-2, -1) @ x)  # [..., k], [..., k, k]
    tiny = values.amax(-1, keepdim=True).clamp_min(0) * (x.shape[-2] * torch.finfo(torch.float32).eps) ** 2  # keys are float32
    inverse = torch.where(values > tiny, 1 / (values + ridge * values.mean(-1, keepdim=True)), 0.0)
    scores: Tensor = ((x @ vectors).square() * inverse[..., None, :]).sum(-1)
    return scores
