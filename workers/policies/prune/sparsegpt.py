"""SparseGPT."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.inverse_moment import BLOCK, inverse_factor, sweep
from workers.mechanisms.pruning import PRUNES, PatternedPolicy, group_of, lowest, lowest_of_groups
from workers.methods import card, knob


class SparseGPT(PatternedPolicy):
    """Set weights to zero column by column; the weights still to come make up for each one's loss.

    Frantar and Alistarh 2023, arXiv:2301.00774, section 3 and algorithm 1: a weight's score is its square over that of the
    diagonal of the inverse moment's Cholesky factor; the lowest scores go in each block of 128 inputs, all output rows
    together, or in each group of neighbours for the patterns 2:4 and 4:8, as the weights stand when their turn comes.

    Deviations: the moment is that of the model before this policy, not layer by layer behind pruned layers. Of inputs that
    are always zero the weights go first, but no more than the block's share. Maps that no calibration input reaches (an
    expert that nobody visits) are pruned by magnitude in each output row. Weights are not rounded at the same time: a
    quantizer may follow. Zeros are stored like any other number, so this alone saves no byte and no time. Convolutions
    stay as they are.
    """

    card: ClassVar[Card] = card(
        id="sparsegpt",
        title="SparseGPT",
        paper="arXiv:2301.00774",
        **PRUNES,
    )
    damp: float = knob(
        0.01, ge=0.0001, le=1.0, help="share of the mean input power added to every input's; higher = losses are passed on less"
    )

    def pruned(self, weight: Tensor, moment: Tensor | None) -> Tensor:
        """[N, K] with the chosen weights at zero and the others updated, float32."""
        if moment is None:
            return weight.masked_fill(self.in_rows(weight.float().abs()), 0)
        factor = inverse_factor(moment, self.damp)
        live = moment.diagonal() > 0
        step = BLOCK if self.pattern == "unstructured" else group_of(self.pattern)[1]
        gone = torch.empty(len(weight), 0, dtype=torch.bool, device=weight.device)

        def settle(j: int, columns: Tensor) -> Tensor:
            nonlocal gone
            if j % step == 0:
                part = columns[:, :step]
                power = factor.diagonal()[j : j + part.shape[1]].square()
                scores = part.square() / power * live[j : j + part.shape[1]]
                if self.pattern == "unstructured":
                    gone = lowest(scores.flatten()[None], int(self.sparsity * scores.numel())).view_as(scores)
                else:
                    gone = lowest_of_groups(scores, self.pattern)
            return columns[:, 0].masked_fill(gone[:, j % step], 0)

        return sweep(weight, factor, settle)
