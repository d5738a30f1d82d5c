"""Prompts as one padded batch, and the state of a generation over them.

Shapes: B batch, L padded prompt length, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workers.mechanisms.cache import PADDING, StudioCache


@dataclass
class Batch:
    """Prompts of one batch, padded on the left.

    Attributes:
        ids: [B, L] token ids; positions: [B, L], -1 where padded; lengths: prompt length per row.
        images: per row its image as the model takes it; empty or None where there is none.
        embeds: [B, L, D] in the place of the ids, once images are among them.
        image_tokens: [B, L] which positions come from an image.
        rotary: [3, B, L] positions for rotary embeddings of models that count images in three directions.
        rotary_shift: [B, 1] what to add to a later token's position to get its rotary one.
        origin: per row the place of each token in the prompt that was given, where some were dropped.
    """

    ids: Tensor
    positions: Tensor
    lengths: list[int]
    images: Sequence[Any] = ()
    embeds: Tensor | None = None
    image_tokens: Tensor | None = None
    rotary: Tensor | None = None
    rotary_shift: Tensor | None = None
    origin: list[list[int]] = field(default_factory=list)

    @property
    def padded(self) -> bool:
        """True if the rows differ in length."""
        return min(self.lengths) != max(self.lengths)

    def only(self, index: Tensor) -> Batch:
        """The batch with these tokens alone, as if they were the prompt: positions are counted anew.

        Rotary positions in three directions stay what they were, as where image tokens are dropped.

        Args:
            index: [B, n] columns, ascending, padding first.
        """
        length, positions = self.ids.shape[1], self.positions.gather(1, index)
        real = positions != PADDING
        lengths = real.sum(1).tolist()
        before = self.origin or [list(range(n)) for n in self.lengths]
        columns = [row[there].tolist() for row, there in zip(index, real, strict=True)]
        gone = torch.tensor([[n - m] for n, m in zip(self.lengths, lengths, strict=True)], device=index.device)
        return Batch(
            self.ids.gather(1, index),
            torch.where(real, real.cumsum(1) - 1, PADDING),
            lengths,
            self.images,
            None if self.embeds is None else self.embeds.gather(1, index[..., None].expand(-1, -1, self.embeds.shape[-1])),
            None if self.image_tokens is None else self.image_tokens.gather(1, index),
            None if self.rotary is None else self.rotary.gather(2, index.expand(3, -1, -1)),
            None if self.rotary_shift is None else self.rotary_shift + gone,
            [[row[c - length + n] for c in here] for row, here, n in zip(before, columns, self.lengths, strict=True)],
        )


def make_batch(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> Batch:
    """Left-pad token ids to one tensor."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    positions = torch.full_like(ids, PADDING)
    for row, p in enumerate(prompts):
        ids[row, longest - len(p) :] = torch.tensor(p, dtype=torch.long)
        positions[row, longest - len(p) :] = torch.arange(len(p))
    return Batch(ids.to(device), positions.to(device), [len(p) for p in prompts])


@dataclass
class State:
    """A generation under way: the cache, the next position of each row, the newest logits [B, V]."""

    cache: StudioCache
    next_position: Tensor  # [B, 1]
    logits: Tensor
    lengths: list[int]
    padded: bool
    rotary_shift: Tensor | None = None  # [B, 1]
    origin: list[list[int]] = field(default_factory=list)


def at_origin(shares: list[float], origin: list[int], length: int) -> list[float]:
    """Shares of the tokens that entered the model, at their places in the prompt that was given; 0 for those dropped before."""
    out = [0.0] * length
    for place, share in zip(origin, shares, strict=True):
        out[place] = share
    return out
