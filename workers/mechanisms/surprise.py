"""How surprising each cached position was: the negative log-likelihood of its token, given those before it.

It is noted beside the entries (:attr:`~workers.mechanisms.cache.HeadGroup.tracked`), the same in all layers and heads.

Shapes: B batch, T new tokens, S stored entries, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import log, sqrt

import torch
from torch import Tensor

from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.cache import StudioCache
from workers.mechanisms.chunk_end import ChunkEnd
from workers.session import Session

SURPRISE = "surprise"  # name in HeadGroup.tracked; NaN where a token has no likelihood
BLOCK = 64  # tokens whose logits are looked at together
GOLDEN = (sqrt(5) - 1) / 2  # its multiples, whole parts left out, lie evenly however many there are


@contextmanager
def noting_surprise(session: Session) -> Iterator[None]:
    """Note the surprise of every token of the prompt and of the answer once it is cached."""

    def chunk(end: ChunkEnd) -> None:
        _note(end.forward, surprise(end.forward, end.logits, session.info.vocab))

    def step(cache: StudioCache, forward: Forward) -> None:
        if (logits := forward.logits) is not None:
            _note(forward, surprise(forward, lambda start, stop: logits[:, start:stop], session.info.vocab))

    with session.hooked(session.after_chunk, chunk), session.hooked(session.after_step, step):
        yield


def surprise(forward: Forward, logits: Callable[[int, int], Tensor], vocabulary: int) -> Tensor:
    """Nats [B, T] of the new tokens.

    Nothing foretells the first token of a text: it has the surprise of a guess among all tokens. An image token has no
    likelihood, so it has none (NaN); the word behind an image has one as any other.

    Args:
        logits: (start, stop) -> logits [B, stop - start, V] behind these of the new tokens.
    """
    ids = forward.ids
    if ids is None:
        raise RuntimeError("a forward without token ids has no likelihood")
    out = torch.zeros(ids.shape, device=ids.device)
    if forward.before is not None:
        out[:, :1] = _nats(forward.before[:, None], ids[:, :1])
    for start in range(0, ids.shape[1] - 1, BLOCK):
        stop = min(start + BLOCK, ids.shape[1] - 1)
        out[:, start + 1 : stop + 1] = _nats(logits(start, stop), ids[:, start + 1 : stop + 1])
    out.masked_fill_(forward.positions == 0, log(vocabulary))
    return out if forward.image_tokens is None else out.masked_fill(forward.image_tokens, float("nan"))


def noted_surprise(call: AttentionCall) -> Tensor:
    """Nats [B, S] of the entries of a layer.

    Image positions are ranked like words: they take the surprise of words at evenly spread ranks, so that about the same
    share of both stays, from everywhere in the image.
    """
    held = call.held
    found = held.tracked[SURPRISE][:, 0].clone()
    unknown = found.isnan()
    if bool(unknown.any()):
        real = torch.ones_like(unknown) if held.real is None else held.real[:, 0]
        for row, image in enumerate(unknown):
            words = found[row, ~image & real[row]].sort().values
            turns = torch.arange(1, int(image.sum()) + 1, dtype=torch.float64, device=words.device) * GOLDEN % 1
            found[row, image] = words[(turns * len(words)).long()] if len(words) else 0.0
    return found


def _nats(logits: Tensor, ids: Tensor) -> Tensor:
    logits = logits.float()
    return logits.logsumexp(-1) - logits.gather(-1, ids[..., None])[..., 0]


def _note(forward: Forward, nats: Tensor) -> None:
    """Let the entries of the new tokens carry their surprise in all layers."""
    for memory in forward.cache.kv_layers:
        for g in memory.groups:
            new, old = nats[:, None].expand(-1, g.stop - g.start, -1), g.tracked.get(SURPRISE)
            g.tracked[SURPRISE] = new if old is None else torch.cat((old[:, :, : -nats.shape[1]], new), 2)
