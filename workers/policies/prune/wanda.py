"""Wanda."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.pruning import PRUNES, PatternedPolicy
from workers.methods import card


class Wanda(PatternedPolicy):
    """Set those weights to zero whose size times the size of their input is smallest in their output row.

    Sun et al. 2023, arXiv:2306.11695, section 3 and algorithm 1: the score of a weight is its absolute value times the L2 norm
    of its input over a calibration text; weights compete within an output row, or with their neighbours for the patterns 2:4
    and 4:8. Nothing is updated or trained.

    Deviations: the norms are those of the model before this policy, not layer by layer behind pruned layers. Maps that no
    calibration input reaches (an expert that nobody visits) are pruned by magnitude. Zeros are stored like any other
    number, the patterns too, so this alone saves no byte and no time. Convolutions stay as they are.
    """

    card: ClassVar[Card] = card(
        id="wanda",
        title="Wanda",
        paper="arXiv:2306.11695",
        **PRUNES,
    )

    def pruned(self, weight: Tensor, moment: Tensor | None) -> Tensor:
        """[N, K] with the lowest scores of each row, or of each group of neighbours, at zero."""
        norms = torch.ones(weight.shape[1], device=weight.device) if moment is None else moment.diagonal().sqrt()
        return weight.masked_fill(self.in_rows(weight.float().abs() * norms), 0)
