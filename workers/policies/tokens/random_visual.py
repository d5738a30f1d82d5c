"""Dropping image tokens at random: what every cleverer choice has to beat."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch

from studio_state.catalog import Card
from workers.mechanisms.visual_tokens import CHOOSES_IMAGE_TOKENS, ChoosesImageTokens, Selection, Visual, selecting
from workers.methods import card
from workers.session import Session


class RandomVisual(ChoosesImageTokens):
    """Keep image tokens drawn at random, before the language model.

    The control of every paper on visual token dropping; folklore. The draw depends on the experiment's seed and the
    item, so a run can be repeated; line breaks between tiles stay.
    """

    card: ClassVar[Card] = card(
        id="random-visual",
        title="Random image tokens",
        **CHOOSES_IMAGE_TOKENS,
    )

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Choose when the image is encoded."""
        return selecting(session, self.card.id, self.keep, self.choose)

    def choose(self, visual: Visual, keep: float) -> Selection:
        """The first of a fixed random order."""
        order = torch.randperm(len(visual.rows), generator=torch.Generator().manual_seed(visual.seed))
        scores = torch.empty(len(order)).index_copy_(0, order, torch.arange(len(order), 0, -1).float())
        return Selection(visual.best(scores.to(visual.features.device), visual.budget(keep)))
