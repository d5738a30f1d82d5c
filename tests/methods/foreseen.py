"""The truth for methods that look ahead: attention maps of the library's eager implementation, and the rules in plain Python.

Every text is read anew as a whole, without a cache; nothing of the studio's is used but its folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests import tiny
from tests.methods.driving import library_model

LLAMA = tiny.llama_folder


def read(ids: Sequence[int], folder: Path | None = None, layers: int = 0) -> Any:
    """What the library makes of a text, by its first layers alone if asked."""
    model = library_model(folder or LLAMA(), "eager")
    whole = model.model.layers
    model.model.layers = whole[: layers or len(whole)]
    try:
        with torch.inference_mode():
            return model(input_ids=torch.tensor([list(ids)]), output_attentions=True, use_cache=False)
    finally:
        model.model.layers = whole


def maps(ids: Sequence[int], folder: Path | None = None) -> list[np.ndarray]:
    """Attention [query heads, L, L] of each layer."""
    return [m[0].double().numpy() for m in read(ids, folder).attentions]


def likeliest(ids: Sequence[int], count: int, folder: Path | None = None, layers: int = 0) -> list[int]:
    """The ``count`` tokens that follow greedily."""
    text = list(ids)
    while len(text) < len(ids) + count:
        text.append(int(read(text, folder, layers).logits[0, -1].argmax()))
    return text[len(ids) :]


def best_around(scores: Sequence[float], kernel: int) -> list[float]:
    """The best of each place and its neighbours, one more after it than before if the kernel is even."""
    before = (kernel - 1) // 2
    return [max(scores[max(0, i - before) : i - before + kernel]) for i in range(len(scores))]


def foreseen(attention: np.ndarray, kv_heads: int, prompt: int, window: int, budget: int, kernel: int) -> list[list[int]]:
    """SpecKV's choice for each KV head, from the attention of one layer over prompt and look-ahead."""
    kept = []
    for heads in np.split(attention, kv_heads):
        votes = heads[:, prompt - window :, : prompt - window].max((0, 1))
        wide = best_around(votes, kernel)
        order = sorted(range(prompt - window), key=lambda i: (-wide[i], -votes[i]))
        kept.append(sorted([*order[: budget - window], *range(prompt - window, prompt)]))
    return kept


def noticed(attentions: Sequence[np.ndarray], prompt: int, window: int) -> np.ndarray:
    """SpecPC's score of each prompt token, from the draft's layers that count, over prompt and what it read of its look-ahead."""
    weights = [*np.linspace(0, 1, window), *[1.0] * (attentions[0].shape[-1] - prompt)]
    rows = [a[:, prompt - window :, :prompt] * np.asarray(weights)[None, :, None] for a in attentions]
    return np.max(rows, (0, 1, 2))


def to_keep(scores: Sequence[float], budget: int, window: int, kernel: int) -> list[int]:
    """SpecPC's choice: the window, then the best by what is best around them, each with its neighbours from near to far."""
    n, wide = len(scores), best_around(scores, kernel)
    before = (kernel - 1) // 2
    wanted = list(range(n - window, n))
    for i in sorted(range(n), key=lambda i: -wide[i])[:budget]:
        wanted += [min(max(i + d, 0), n - 1) for d in sorted(range(-before, kernel - before), key=abs)]
    return sorted(list(dict.fromkeys(wanted))[:budget])
