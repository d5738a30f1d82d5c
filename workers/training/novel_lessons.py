"""Lessons in the next token: a stream of chapters cut into rows, their loss, and the perplexity of what was held out.

Shapes: B rows of L tokens; V tokens in the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from workers.data.novels import held_out
from workers.training.loop import TrainingRun

UNSCORED = -100  # label of a place that has no next token
WINDOW, STRIDE = 512, 256  # tokens a held-out window holds, and how many of them are scored


def as_stream(chapters: Sequence[str], tokenizer: Any) -> NDArray[np.int64]:
    """All chapters as one row of ids: begin, text, end, begin, text, end, ..."""
    ids = tokenizer(list(chapters), add_special_tokens=False, verbose=False)["input_ids"]
    return np.array(
        [i for chapter in ids for i in (tokenizer.bos_token_id, *chapter, tokenizer.eos_token_id)],
        dtype=np.int64,
    )


class Batch(NamedTuple):
    """Tokens and what follows each of them, both [B, L]; ``UNSCORED`` where nothing does."""

    ids: Tensor
    labels: Tensor


class Rows:
    """The stream as a ring, cut into rows: in each pass, every token is predicted exactly once.

    Each pass cuts at another place, drawn at random, and takes its rows in another order. The last row of a
    pass is filled up with places that are not scored.

    Args:
        phase: names the random numbers, so that rows of another length have others.
    """

    def __init__(self, run: TrainingRun, phase: str, stream: NDArray[np.int64], length: int, batch_size: int) -> None:
        self.run, self.phase, self.stream, self.length, self.batch_size = run, phase, stream, length, batch_size
        self.per_pass = -(-len(stream) // length)
        self._pass, self._shift, self._order = -1, 0, np.arange(0)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0; it may hold the last rows of one pass and the first of the next."""
        rows = [self._row(*divmod(step * self.batch_size + b, self.per_pass)) for b in range(self.batch_size)]
        ids, labels = (np.stack(part) for part in zip(*rows, strict=True))
        return Batch(torch.from_numpy(ids), torch.from_numpy(labels))

    def _row(self, number: int, at: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row ``at`` of a pass."""
        if number != self._pass:
            rng = self.run.rng(self.phase, number)
            self._pass, self._shift = number, int(rng.integers(len(self.stream)))
            self._order = rng.permutation(self.per_pass)
        return row_of(self.stream, self.length, self._shift, int(self._order[at]))


def row_of(stream: NDArray[np.int64], length: int, shift: int, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row ``number`` of the ring that is cut at ``shift``: ids [L] and labels [L]."""
    places = number * length + np.arange(length + 1)
    tokens = stream[(shift + places) % len(stream)]
    return tokens[:-1], np.where(places[:-1] < len(stream), tokens[1:], UNSCORED)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in nats of logits [B, L, V] at labels [B, L], in float32."""
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=UNSCORED)


class HeldOut(NamedTuple):
    """A window of held-out text.

    Attributes:
        ids: [1, L] with L at most ``WINDOW``.
        first: the tokens from here on are scored, each by the logits one place before it.
    """

    ids: Tensor
    first: int

    @property
    def scored(self) -> Tensor:
        """The scored tokens [n]."""
        return self.ids[0, self.first :]

    def at_scored(self, logits: Tensor) -> Tensor:
        """Of logits [1, L, V] those that predict the scored tokens: [n, V] in float32."""
        return logits[0, self.first - 1 : -1].float()


def windows(ids: Sequence[int]) -> Iterator[HeldOut]:
    """Windows in which every token but the first of all is scored once, with 256 to 511 tokens before it.

    The first window alone scores tokens with fewer before them.
    """
    row = torch.tensor(ids, dtype=torch.long)[None]
    for start in range(0, max(1, len(ids) - STRIDE), STRIDE):
        yield HeldOut(row[:, start : start + WINDOW], STRIDE if start else 1)


def held_out_ids(tokenizer: Any, examples: int | None = None) -> list[int]:
    """Tokens of the held-out text, or the first of them: one more than ``examples``, since the first is not scored."""
    ids: list[int] = tokenizer(held_out(), add_special_tokens=False, verbose=False)["input_ids"]
    return ids if examples is None else ids[: examples + 1]


@torch.inference_mode()
def likelihood(
    model: Any, tokenizer: Any, ids: Sequence[int], say: Callable[[str, float | None], None] = lambda text, done: None
) -> tuple[dict[str, float], int]:
    """Perplexity (per token) and bits per character of the text of ``ids``, and how many tokens were scored.

    The first token has nothing before it and counts in neither.
    """
    nats, scored = 0.0, 0
    for window in windows(ids):
        say(f"scoring: {scored} of {len(ids) - 1} tokens", scored / (len(ids) - 1))
        logits = window.at_scored(model(input_ids=window.ids, use_cache=False).logits)
        nats += nn.functional.cross_entropy(logits, window.scored, reduction="sum").item()
        scored += len(window.scored)
    characters = len(tokenizer.decode(ids[1:]))
    return {"perplexity": math.exp(nats / scored), "bits_per_character": nats / math.log(2) / characters}, scored
