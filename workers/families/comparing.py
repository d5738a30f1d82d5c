"""How far a lane is from the reference, and what its cache still holds.

Shapes: B batch, V vocabulary, S stored entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.mechanisms.cache import StudioCache


def distance(reference: Tensor, lane: Tensor) -> dict[str, float]:
    """Mean KL(reference || lane) in nats and share of equal arg-max, of log-probabilities [n, V]."""
    kl = (reference.exp() * (reference - lane)).sum(-1).mean()
    return {
        "kl_to_baseline": max(0.0, float(kl)),
        "top1_agreement": float((reference.argmax(-1) == lane.argmax(-1)).float().mean()),
    }


def kept_shares(cache: StudioCache, lengths: Sequence[int]) -> list[list[list[float]]]:
    """Per row, per layer: share of KV heads that still hold each prompt token."""
    rows = []
    device = torch.device("cpu")
    for row, length in enumerate(lengths):
        layers = []
        for layer in cache.kv_layers:
            held, heads = torch.zeros(length), 0
            for g in layer.groups:
                n = g.stop - g.start
                positions = g.logical(len(lengths), device)[row].cpu()  # [1 or n, S]
                weight = n / positions.shape[0]
                for p in positions:
                    held[p[(p >= 0) & (p < length)]] += weight
                heads += n
            layers.append((held / max(1, heads)).tolist())
        rows.append(layers)
    return rows


def similarity(a: Tensor, b: Tensor) -> float:
    """Cosine of two vectors."""
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))
