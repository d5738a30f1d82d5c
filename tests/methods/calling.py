"""An attention call made by hand, for choices that are worked out on paper, and what a state holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.methods.driving import library_model
from workers.families.batches import State
from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.cache import KVLayer, StudioCache


def attention_call(
    keys: Tensor, query: Tensor | None = None, values: Tensor | None = None, lengths: Sequence[int] = (), layers: int = 1
) -> AttentionCall:
    """The end of a prompt in the first layer, unscaled logits.

    Args:
        keys, values: [B, H, S, D]; values default to the keys.
        query: [B, Hq, S, D], zeros by default.
        lengths: prompt tokens of each row, padded on the left; default: no padding.
    """
    b, _, s, _ = keys.shape
    lengths = list(lengths) or [s] * b
    places = torch.stack([torch.cat((torch.full((s - n,), -1), torch.arange(n))) for n in lengths])
    cache = StudioCache(layers)
    layer: KVLayer = cache.layers[0]
    layer.append(keys, keys if values is None else values, places, s, padded=min(lengths) != s)
    forward = Forward(cache, "prefill", places, ends_prefill=True, prompt_lengths=lengths, seen=s)
    return AttentionCall(0, torch.zeros_like(keys) if query is None else query, layer, forward, 1.0)


def kept(state: State) -> list[np.ndarray]:
    """Positions that a state of one row holds, per layer: [H, n]."""
    return kept_in(state.cache)


def kept_in(cache: StudioCache) -> list[np.ndarray]:
    """Positions that a cache of one row holds, per layer: [H, n]."""
    return [layer.held().places().expand(1, layer.heads, -1)[0].numpy() for layer in cache.layers]


def library_maps(folder: Any, ids: Sequence[int], **given: Any) -> list[np.ndarray]:
    """Attention of the library's eager implementation, per layer [Hq, T, S]."""
    with torch.inference_mode():
        out = library_model(folder, "eager")(input_ids=torch.tensor([list(ids)]), output_attentions=True, **given)
    return [m[0].double().numpy() for m in out.attentions]


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """Places of the best scores of each row, ascending."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :count], axis=-1)
