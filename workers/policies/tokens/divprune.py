"""DivPrune."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.visual_tokens import CHOOSES_IMAGE_TOKENS, ChoosesImageTokens, Selection, Visual, selecting
from workers.methods import card
from workers.session import Session


class DivPrune(ChoosesImageTokens):
    """Keep the image tokens that differ most from each other, before the language model.

    Alvar et al. 2025, arXiv:2503.02175, algorithm 1: the max-min diversity problem, solved greedily over cosine
    distances of the features that enter the language model. Line breaks between tiles stay and do not count.
    """

    card: ClassVar[Card] = card(
        id="divprune",
        title="DivPrune",
        paper="arXiv:2503.02175",
        **CHOOSES_IMAGE_TOKENS,
    )

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Choose when the image is encoded."""
        return selecting(session, self.card.id, self.keep, self.choose)

    def choose(self, visual: Visual, keep: float) -> Selection:
        """Greedy choice among the tokens of patches."""
        places = visual.placed.nonzero()[:, 0]
        count = visual.budget(keep)
        if count >= len(places):
            return Selection(visual.with_breaks(places))
        return Selection(visual.with_breaks(places[most_diverse(visual.features[places], count)]))


def most_diverse(features: Tensor, count: int) -> Tensor:
    """Indices [count] of a set whose smallest cosine distance is large: of features [n, D], chosen greedily.

    The first is the one whose nearest neighbour is farthest away; each next one is farthest from those chosen.
    """
    unit = F.normalize(features.float(), dim=-1)
    distance = 1 - unit @ unit.T  # [n, n]
    distance.fill_diagonal_(float("inf"))
    first = distance.amin(1).argmax()
    chosen = [int(first)]
    distance.fill_diagonal_(0.0)
    nearest = distance[first].clone()
    for _ in range(count - 1):
        nearest[chosen[-1]] = -1.0
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[chosen[-1]])
    return torch.tensor(chosen, device=features.device)
