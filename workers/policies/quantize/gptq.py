"""GPTQ."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms import packing
from workers.mechanisms.calibration import Want
from workers.mechanisms.inverse_moment import BLOCK, inverse_factor, sweep
from workers.mechanisms.rounding import ROW_BITS, GroupedPolicy
from workers.mechanisms.weight_policy import QUANTIZES, CalibratedPolicy, Spot
from workers.methods import card, knob


class GPTQ(CalibratedPolicy, GroupedPolicy):
    """Round the weights of a linear map column by column; the columns still to come make up for each one's error.

    Frantar et al. 2022, arXiv:2210.17323, "The GPTQ Algorithm", step 3, and algorithm 1: the error of a column, over the
    diagonal of the Cholesky factor of the inverse second moment of the inputs, is passed on along that factor's row. A group's
    grid is found on the weights as they stand when its first column comes, or, with ``act_order``, on the original ones before
    all (the released code's ``static_groups``), so that groups stay runs of neighbouring inputs and nothing is permuted when
    it runs.

    Deviations: columns are worked through in blocks as long as a group, so a grid sees all errors that were passed on (the
    released code finds it from weights that lack those of the running block of 128). Statistics are taken on the model
    before this policy, not layer by layer on its own output. Inputs that are always zero are rounded to the nearest, not set
    to zero. Weights that an earlier policy made zero stay zero, and their error is passed on too. With 8 bits there is one
    symmetric scale a row. Maps that no calibration input reaches (an expert that nobody visits) are rounded to the
    nearest; so is the head with ``head=int8``. Convolutions stay as they are. Memory and speed are those of ``rtn``.
    """

    card: ClassVar[Card] = card(
        id="gptq",
        title="GPTQ",
        paper="arXiv:2210.17323",
        hopes={"decode_tokens_per_s": "up"},
        not_neutral_because="every setting rounds; on inputs that do not correlate it is round-to-nearest",
        **QUANTIZES,
    )
    wants: ClassVar[frozenset[Want] | None] = frozenset({"moment"})

    bits: int = knob(4, ge=2, le=8, help="bits a weight; fewer = smaller, less exact; 4 and 8 have fast CPU kernels, others none")
    damp: float = knob(
        0.01, ge=0.0001, le=1.0, help="share of the mean input power added to every input's; higher = errors are passed on less"
    )
    act_order: bool = knob(
        False, help="inputs of the largest power first, on grids of the original weights; off = in their order"
    )

    def codes(self, weight: Tensor, grid: Tensor, bits: int, spot: Spot) -> tuple[Tensor, Tensor]:
        """Codes uint8 [N, K] by error feedback, and their grid [K/g, N, 2]."""
        if spot.seen is None or spot.seen.moment is None:
            return super().codes(weight, grid, bits, spot)
        moment, group = spot.seen.moment.to(weight.device), weight.shape[1] // grid.shape[0]
        order = list(range(len(moment)))
        if self.act_order:
            order = moment.diagonal().argsort(descending=True, stable=True).tolist()
        grid, codes, masked = grid.clone(), torch.empty(weight.shape, dtype=torch.uint8, device=weight.device), weight == 0
        steps, zeros = grid.float().unbind(-1)  # [K/g, N] each
        moving, half = bits < ROW_BITS and not self.act_order, 2 ** (bits - 1)
        lowest = 1 - half if bits == ROW_BITS else -half  # codes of a row's scale are symmetric

        def settle(j: int, columns: Tensor) -> Tensor:
            at, g = order[j], order[j] // group
            if moving and j % group == 0:
                grid[g] = packing.fit_groups(columns.masked_fill(masked[:, j : j + group], 0.0), group, bits)[0]
                steps[g], zeros[g] = grid[g].float().unbind(-1)
            wanted = columns[:, 0].masked_fill(masked[:, at], 0.0)
            levels = ((wanted - zeros[g]) / steps[g]).round_().clamp_(lowest, half - 1)
            codes[:, at] = levels + half
            return levels * steps[g] + zeros[g]

        factor = inverse_factor(moment[order][:, order], self.damp)
        sweep(weight.float()[:, order], factor, settle, group if moving else BLOCK)
        return codes, grid
