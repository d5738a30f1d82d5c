"""A small UNet that draws clothes from noise: the studio's pixel diffusion model.

Shapes: B batch, grey images [B, 1, 28, 28] from -1 to 1; levels of 28, 14 and 7 pixels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from studio_state.catalog import Card
from workers.methods import card, knob
from workers.training.diffusion_lessons import eager_attention, v_loss
from workers.training.fashion_recipe import NULL, FashionRecipe


class FashionUNet(FashionRecipe):
    """Train a small class-conditional UNet on Fashion-MNIST.

    Ho et al. 2020, arXiv:2006.11239, with the cosine schedule (arXiv:2102.09672), velocity prediction
    (arXiv:2202.00512) and labels hidden now and then for guidance (arXiv:2207.12598), in 1,000 steps of noise
    at 28 x 28 pixels. The moving average of the weights is handed over with a DDIM scheduler.
    """

    card: ClassVar[Card] = card(
        id="fashion-unet", title="UNet on Fashion-MNIST", kind="recipe", families=("diffusion",), paper="arXiv:2006.11239"
    )
    part: ClassVar[str] = "unet"
    warmup: ClassVar[int] = 200

    width: int = knob(32, ge=8, le=256, multiple_of=8, help="channels at 28 pixels, two and three times as many below")

    def scheduler(self) -> Any:
        """DDIM; its steps start at the last timestep, whose sample is noise alone (Lin et al. 2023, arXiv:2305.08891)."""
        from diffusers import DDIMScheduler

        return DDIMScheduler(  # type: ignore[no-untyped-call]
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=True, timestep_spacing="trailing"
        )

    def loss(self, net: nn.Module, scheduler: Any, x: Tensor, labels: Tensor, rng: np.random.Generator) -> Tensor:
        """The predicted velocity's error."""
        return v_loss(net, scheduler, x, labels, rng)

    def model(self) -> Any:
        """The untrained network; attention at 7 x 7 pixels only."""
        from diffusers import UNet2DModel

        net: Any = UNet2DModel(  # type: ignore[no-untyped-call]
            sample_size=28,
            in_channels=1,
            out_channels=1,
            block_out_channels=(self.width, 2 * self.width, 3 * self.width),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=self.width,
            num_class_embeds=NULL + 1,
        )
        eager_attention(net)
        return net
