"""LagKV."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import FREE, Guarded
from workers.mechanisms.evictor import EVICTS, Evictor
from workers.methods import card, knob
from workers.session import Session

TIE = 2.0**-20  # far below the distance of two ranks: equal ranks are told apart without changing any order


class LagKV(Evictor):
    """Keep the cached positions whose keys and values stand out against the range of those that come after them.

    Liang et al. 2025, arXiv:2504.04704, lag-relative information: behind the sinks the entries form chunks of ``lag``. In every chunk,
    keys and values are scaled by the minimum and maximum that each channel has in the next chunk; an entry's score is
    the standard deviation over its scaled channels, as a softmax within the chunk, keys and values averaged. Every
    chunk keeps as many. No attention is needed; every KV head chooses for itself.

    The last full chunk has no next one: it stays with what is behind it, as a window of ``lag`` to 2 ``lag`` - 1
    entries, and so do the sinks, even where they exceed the budget. A prompt shorter than ``sinks`` + 2 ``lag`` has no
    chunk that can be compared and stays whole, as in the paper (kvpress keeps its newest positions instead); the
    paper's lag of 128 to 1024 suits long texts, so the default is 16, which acts from 36 tokens on.

    Deviations: the budget is a share of the prompt, sinks and window included; where it does not divide by the number
    of chunks, later chunks keep one more; a channel that does not vary in the next chunk counts as 0 (the formula
    divides by 0); by default it acts once, at the end of the prompt (the paper goes on while answering: ``when`` =
    both; there chunks are counted anew among the entries that are left).
    """

    card: ClassVar[Card] = card(id="lagkv", title="LagKV", paper="arXiv:2504.04704", **EVICTS)
    lag: int = knob(16, ge=2, le=1024, help="entries of a chunk, and least of the window that stays; longer = steadier scores")
    sinks: int = knob(4, ge=0, le=256, help="first positions that always stay")
    compete: bool = knob(False, help="let chunks compete by their scores instead of keeping as many each; suits adaptive heads")

    def scores(self, call: AttentionCall) -> Tensor | None:
        """Rank within the chunk [B, H, S], infinite for what always stays; None if nothing can be compared."""
        held, real = call.held, self.real(call)
        (b, h, s), compared = real.shape, self.compared(real)
        most = int(compared.max())
        if most == 0:
            return None
        entries = real.int().argsort(dim=-1, descending=True, stable=True)  # real ones first, in their order
        chunked = entries[:, :, self.sinks : self.sinks + (most + 1) * self.lag]
        worth = (self.deviation(held.keys, chunked, most) + self.deviation(held.values, chunked, most)).double() / 2
        chunk = torch.arange(most, device=real.device)[:, None]
        if not self.compete:
            head = torch.arange(h, device=real.device)[:, None, None] / h
            worth = worth.argsort(dim=-1, stable=True).argsort(dim=-1) + (chunk + head) * TIE
        worth = worth.masked_fill(chunk >= compared[..., None, None], float("inf"))
        scores = worth.new_full((b, h, s), float("inf"))
        return scores.scatter(2, chunked[:, :, : most * self.lag], worth.flatten(2))

    def deviation(self, x: Tensor, chunked: Tensor, most: int) -> Tensor:
        """Softmax of the deviations against the next chunk [B, H, chunks, lag], of keys or values [B, H, S, D]."""
        b, h, _, d = x.shape
        chunks = x.float().gather(2, chunked[..., None].expand(-1, -1, -1, d)).view(b, h, most + 1, self.lag, d)
        low, high = chunks[:, :, 1:].amin(3, keepdim=True), chunks[:, :, 1:].amax(3, keepdim=True)
        span = high - low
        scaled = torch.where(span > 0, (chunks[:, :, :-1] - low) / span, 0.0)
        return scaled.std(-1).softmax(-1)

    def real(self, call: AttentionCall) -> Tensor:
        """Which entries are no padding [B, H, S]."""
        held = call.held
        shape = held.keys.shape[:3]
        return torch.ones(shape, dtype=torch.bool, device=held.keys.device) if held.real is None else held.real.expand(shape)

    def compared(self, real: Tensor) -> Tensor:
        """Chunks that have a full one behind them [B, H]."""
        return (torch.div(real.sum(-1) - self.sinks, self.lag, rounding_mode="floor") - 1).clamp_min(0)

    def counts(self, call: AttentionCall, guarded: Guarded = FREE) -> list[int]:
        """The budget of each row, at least what is not compared."""
        real = self.real(call)
        rest = (real.sum(-1) - self.compared(real) * self.lag).amax(1)
        return [max(n, most) for n, most in zip(super().counts(call, guarded), rest.tolist(), strict=True)]

    def why_idle(self, session: Session) -> str:
        """Prompts that are too short for two chunks."""
        least = self.sinks + 2 * self.lag
        return (
            f"{self.card.title} changed nothing: with sinks = {self.sinks} and lag = {self.lag} it leaves prompts under {least} "
            "tokens whole; lower lag or keep, or give longer prompts"
        )
