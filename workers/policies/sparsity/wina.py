"""WINA."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.linear import Replacement
from workers.mechanisms.sparse_inputs import SKIPPED, SparseInput, SparseInputPolicy
from workers.mechanisms.weight_policy import Spot
from workers.methods import card, knob

RELEASED = ("k_proj", "gate_proj")  # maps whose column norms the released code uses


class WINA(SparseInputPolicy):
    """Multiply, for each token, only those inputs of a linear map whose size times the norm of their weights is largest.

    Chen et al. 2025, arXiv:2505.19427, section 3: of K inputs the top ``keep`` by |x_j| times the L2 norm of the weights' column j
    stay, for each token anew. That this moves the output least holds where the columns are orthogonal; for that the authors
    rotate the residual stream so that the columns of the key and gate projections are. It is not done here: it spreads large
    activations over all channels, and adds two products of the width squared to each layer. So the columns are what they are,
    and the bound does not hold.

    Deviations: every map counts its own norms, where the released code does for the key and gate projections only and ranks
    the inputs of all others by |x_j| (``norms=key-and-gate``). Every map keeps the same share; the authors search one for each
    layer. The first tokens of a prompt stay whole, a number of them and not the first percent. Experts' maps do not know a
    token's place and make no such exception. Maps of one input choose differently, so lean-decode does not fuse them. The norms
    take four bytes an input. The output head stays dense.
    """

    card: ClassVar[Card] = card(
        id="wina",
        title="WINA",
        paper="arXiv:2505.19427",
        stage="sparsity",
        families=("llm", "vlm"),
        owns=("activations.sparsity",),
        effects={SKIPPED: "up"},
        hopes={"decode_tokens_per_s": "up"},
        neutral={"keep": 1.0},
    )
    norms: Literal["all", "key-and-gate"] = knob(
        "all",
        help="maps that weigh their inputs by their weights' norms: all, or those of the released code (others by size alone)",
    )

    def sparse(self, inner: Replacement, spot: Spot) -> SparseInput:
        """The map behind a choice by size and norm."""
        counts = self.norms == "all" or spot.name.rpartition(".")[2] in RELEASED
        return TopInput(inner, self.keep, torch.linalg.vector_norm(inner.matrix(), dim=0) if counts else None)


class TopInput(SparseInput):
    """Multiplies a fixed number of inputs of each token, those with the largest scores.

    Args:
        norms: what the size of an input is multiplied with, float32 [K]; None = nothing.
    """

    norms: Tensor | None

    def __init__(self, inner: Replacement, keep: float, norms: Tensor | None):
        super().__init__(inner, keep)
        self.register_buffer("norms", norms)
        self.count = max(1, round(keep * self.in_features))

    def _best(self, x: Tensor) -> Tensor:
        """Indices [..., k]."""
        scores = x.abs() if self.norms is None else x.abs() * self.norms
        return scores.topk(self.count, -1, sorted=False).indices

    def chosen(self, x: Tensor) -> Tensor:
        """The k best inputs of each token."""
        return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, self._best(x), True)

    def chosen_of_one(self, x: Tensor) -> Tensor:
        """The k best of one row."""
        return self._best(x)

    def like(self, inner: Replacement) -> TopInput:
        """The same number by the same norms."""
        return TopInput(inner, self.keep, self.norms)

    def own(self) -> Hashable:
        """Maps by size alone choose alike; norms are of one map."""
        return self.count if self.norms is None else id(self)
