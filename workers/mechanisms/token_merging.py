"""Merging tokens that are alike: bipartite soft matching (ToMe, arXiv:2210.09461, section 3 and appendix D).

Shapes: B views, T tokens, C width, r merged tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.mechanisms.vision_attention import VisionForward


@dataclass(frozen=True)
class Matching:
    """Which tokens go into which.

    Attributes:
        new: [B, T] place of every token among the T - r that are left.
        left: T - r.
    """

    new: Tensor
    left: int

    def merge(self, x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Size-weighted means of x [B, T, C], and the new sizes [B, T - r]."""
        total = torch.zeros(len(x), self.left, dtype=sizes.dtype, device=x.device).scatter_add_(1, self.new, sizes)
        weighted = x * sizes[..., None].to(x.dtype)
        summed = torch.zeros(len(x), self.left, x.shape[-1], dtype=x.dtype, device=x.device)
        summed.scatter_add_(1, self.new[..., None].expand_as(x), weighted)
        return summed / total[..., None].to(x.dtype), total


def match(metric: Tensor, r: int, protected: int) -> Matching:
    """Pair the r most similar tokens of the two halves (every other token) of each row.

    Args:
        metric: [B, T, C] what is compared by cosine: the keys, mean over heads.
        protected: tokens at the front that are never merged (CLS).
    """
    b, t, _ = metric.shape
    r = max(0, min(r, (t - protected) // 2))
    unit = F.normalize(metric.float(), dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # [B, A, B']
    a_front, b_front = (protected + 1) // 2, protected // 2
    scores[:, :a_front] = float("-inf")
    scores[:, :, :b_front] = float("-inf")
    best, partner = scores.max(-1)
    order = best.sort(dim=-1, descending=True, stable=True).indices
    going, staying = order[:, :r], order[:, r:].sort(-1).values  # in their old order, so that CLS stays in front
    places = torch.empty(b, t, dtype=torch.long, device=metric.device)
    targets = scores.shape[2]
    ahead = staying.shape[1]
    places.scatter_(1, 2 * staying, torch.arange(ahead, device=metric.device).expand(b, -1))
    places[:, 1::2] = ahead + torch.arange(targets, device=metric.device)
    places.scatter_(1, 2 * going, ahead + partner.gather(1, going))
    return Matching(front_first(t - r, places[0, :protected])[places], t - r)


def front_first(left: int, front: Tensor) -> Tensor:
    """[left] new place of each token, so that those at ``front`` come first (DeiT's second token is of the other half)."""
    rest = torch.ones(left, dtype=torch.bool, device=front.device)
    rest[front] = False
    order = torch.cat([front, rest.nonzero()[:, 0]])
    return order.argsort()


def merge_tokens(vision: VisionForward, hidden: Tensor, metric: Tensor, r: int, protected: int) -> Tensor:
    """Merge r tokens of hidden [B, T, C] and note it in the encoder pass: sizes for attention, sources for the screen."""
    b, t, _ = hidden.shape
    matching = match(metric, r, protected)
    sizes = vision.sizes if vision.sizes is not None else torch.ones(b, t, device=hidden.device)
    source = vision.source if vision.source is not None else torch.arange(t, device=hidden.device).expand(b, -1)
    merged, vision.sizes = matching.merge(hidden, sizes)
    vision.source = matching.new.gather(1, source)
    return merged


def schedule(patches: int, left: int, layers: int) -> list[int]:
    """Patches behind each layer: even steps from all of them to ``left``, the first steps taking the rest.

    A layer merges at most half of what it gets, so where few are to be left, the last layers' merges move forward.
    """
    step, rest = divmod(patches - left, layers)
    even = [patches - step * i - min(i, rest) for i in range(1, layers + 1)]
    return [min(n, left * 2 ** (layers - i)) for i, n in enumerate(even, 1)]
