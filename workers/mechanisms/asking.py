"""Asking a prompt's question behind every chunk of it: read its last tokens there, evict by them, take them back.

So a long prompt is cut back while it is read, by what the question wants of it, which stands at its very end.

Shapes: B batch, L padded prompt length, S stored entries, n tokens of the question that are not read yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from workers.families.batches import Batch
from workers.families.llm import LanguageFamily
from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.cache import PADDING
from workers.mechanisms.chunk_end import ChunkEnd
from workers.mechanisms.state_layer import StateLayer
from workers.session import Session


@dataclass(frozen=True)
class Question:
    """The last tokens of a batch of prompts, when it was read up to some chunk.

    Attributes:
        read: prompt tokens of each row that were read so far.
        begun: tokens of the question among the newest of them.
    """

    read: list[int]
    begun: int


Score = Callable[[AttentionCall], Tensor]
Choose = Callable[[AttentionCall, Tensor, Question], Tensor | None]


@contextmanager
def asking(session: Session, policy: str, window: int, score: Score, choose: Choose) -> Iterator[None]:
    """After every chunk of the prompt but the last, let ``choose`` evict by what the question attends to.

    The question is the last ``window`` tokens; those that are not read yet pass through the model directly behind the
    chunk, wherever they stand in the prompt, and leave no trace.

    Args:
        score: attention call of the question, its own entries stored -> scores of all entries [B, S].
        choose: the same call, the question's entries taken back; scores of the others; the question -> entries to keep,
            ascending [B, H, m]; None = all.
    """
    batches: list[Batch] = []

    def remember(batch: Batch) -> Batch:
        batches[:] = [batch]
        return batch

    def ask(end: ChunkEnd) -> None:
        if end.forward.ends_prefill:
            batches.clear()
        elif batches:
            _ask(session, policy, batches[0], end.forward, window, score, choose)

    with session.hooked(session.prompt_filters, remember), session.hooked(session.after_chunk, ask):
        yield


def _ask(session: Session, policy: str, batch: Batch, chunk: Forward, window: int, score: Score, choose: Choose) -> None:
    cache, length, family = chunk.cache, batch.ids.shape[1], cast(LanguageFamily, session.family)
    n = min(window, length - chunk.seen)
    own = slice(length - n, length)
    real = batch.positions[:, own] != PADDING
    read = (batch.positions[:, : chunk.seen] != PADDING).sum(1)
    question = Question(read.tolist(), min(window - n, chunk.seen))
    kept = list(cache.layers)

    def observe(call: AttentionCall) -> None:
        scores = score(call)[:, :-n]
        for group in call.cache.groups:
            group.crop(n)
        call.cache.seen = chunk.seen
        index, layer = choose(call, scores, question), kept[call.layer]
        if index is not None:
            before = layer.stored
            layer.keep(index)
            session.did(policy, before - layer.stored)

    forward = Forward(
        cache=cache,
        phase="prefill",
        positions=torch.where(real, read[:, None] + real.cumsum(1) - 1, PADDING),
        padded=chunk.padded,
        prompt_lengths=chunk.prompt_lengths,
        kernel=chunk.kernel,
        observers=[observe],
        image_tokens=None if batch.image_tokens is None else batch.image_tokens[:, own],
        ids=batch.ids[:, own],
        seen=chunk.seen + n,
    )
    embeds = None if batch.embeds is None else batch.embeds[:, own]
    cache.layers = [layer.clone() if isinstance(layer, StateLayer) else layer for layer in kept]  # states cannot be taken back
    try:
        family.library_forward(session, batch.ids[:, own], forward, True, embeds, _turned(batch, chunk.seen, own, real))
    finally:
        cache.layers = kept


def _turned(batch: Batch, seen: int, own: slice, real: Tensor) -> Tensor | None:
    """Rotary positions [3, B, n] of the question behind what was read, where they are not the plain ones."""
    if batch.rotary is None:
        return None
    rotary = batch.rotary[:, :, own]
    first = rotary.masked_fill(~real, torch.iinfo(rotary.dtype).max).amin((0, 2))  # [B]
    behind = batch.rotary[:, :, :seen].amax((0, 2)) + 1
    return rotary + (behind - first)[:, None]
