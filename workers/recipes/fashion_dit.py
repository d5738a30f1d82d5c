"""A small diffusion transformer that draws clothes from noise: the studio's flow-matching model.

Shapes: B batch, grey images [B, 1, 28, 28] from -1 to 1; patch 4 gives 49 tokens.
"""

from __future__ import annotations

from typing import ClassVar

from studio_state.catalog import Card
from workers.methods import card, knob
from workers.training.fashion_recipe import FashionFlowRecipe


class FashionDiT(FashionFlowRecipe):
    """Train a small class-conditional diffusion transformer on Fashion-MNIST.

    Peebles & Xie 2023, arXiv:2212.09748 (DiT with adaLN-zero blocks), at 28 x 28 pixels in patches of 4, without a
    VAE, taught by flow matching with noise levels from the middle (Esser et al. 2024, arXiv:2403.03206) in the place
    of the paper's noise prediction. The moving average of the weights is handed over with an Euler scheduler.
    """

    card: ClassVar[Card] = card(
        id="fashion-dit", title="DiT on Fashion-MNIST", kind="recipe", families=("diffusion",), paper="arXiv:2212.09748"
    )
    channels: ClassVar[int] = 1
    edge: ClassVar[int] = 28
    patch: ClassVar[int] = 4

    steps: int = knob(7000, ge=1, le=1_000_000, help="optimizer steps; more = better pictures")
