"""Choosing the prompt tokens that the prompt's last one asks for in one layer.

Shapes: B batch, L prompt tokens, Hq query heads, H KV heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.ranking import best_of_real


def last_query_logits(call: AttentionCall) -> Tensor:
    """Logits of the last token's query over all stored keys [B, L], before any softmax, mean over the query heads."""
    query, keys = call.query[:, :, -1].float(), call.keys.float()  # [B, Hq, D], [B, H, L, D]
    b, h, _, d = keys.shape
    logits = query.view(b, h, -1, d) @ keys.transpose(2, 3) * call.scaling
    return logits.flatten(1, 2).mean(1)


def most_asked_for(scores: Tensor, real: Tensor, counts: Tensor, kernel: int, own: bool) -> Tensor | None:
    """The tokens with the best scores, smoothed by pooling over their neighbours, and always the last one.

    Args:
        scores: [B, L], higher = keep.
        real: the same shape, False for padding, which stands on the left.
        counts: [B] tokens to keep before the last one.
        kernel: width of the smoothing, odd; places beyond the text count as 0.
        own: what the last token asks of itself smooths its neighbours' scores too.

    Returns:
        Indices [B, n], ascending, filled up with padding where rows differ. None if every row keeps everything.
    """
    lengths = real.sum(1)
    if bool((counts >= lengths - 1).all()):
        return None
    scores = scores.masked_fill(~real, 0.0)
    if not own:
        scores[:, -1] = 0.0
    smooth = F.avg_pool1d(scores[:, None], kernel, 1, kernel // 2)[:, 0, : scores.shape[1]]
    smooth[:, -1] = float("inf")
    return best_of_real(smooth, real, torch.minimum(counts + 1, lengths))
