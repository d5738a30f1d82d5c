"""A small VAE, and a diffusion transformer that draws clothes in its latents: the studio's latent diffusion model.

Shapes: B batch, grey images [B, 1, 28, 28] from -1 to 1, latents [B, 4, 7, 7]; patch 1 gives 49 tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from studio_state.catalog import Card
from workers.data.fashion import held_out
from workers.methods import card, knob
from workers.training.autoencoder_lessons import autoencoder_loss, latents_of, reconstruction_psnr
from workers.training.diffusion_lessons import pictures, round_weights
from workers.training.fashion_recipe import FashionFlowRecipe, Subject
from workers.training.loop import Schedule, TrainingRun, fit

PHASE = "autoencode"
AVERAGE = 0.99  # of the VAE's weights: short, since there are few steps and the learning rate ends at zero


class FashionLatent(FashionFlowRecipe):
    """Train a small VAE on Fashion-MNIST, then a class-conditional diffusion transformer on its latents.

    Rombach et al. 2022, arXiv:2112.10752: a VAE with a weak pull towards a normal distribution (section 3.1) and without
    adversarial and perceptual terms makes 4 x 7 x 7 numbers of 28 x 28 pixels; they are shifted to a mean of zero
    and scaled to a spread of one (appendix G has the scale only), encoded once, and drawn by the transformer of
    ``fashion-dit``, a position a token. The moving averages of the weights are handed over with an Euler scheduler.
    """

    card: ClassVar[Card] = card(
        id="fashion-latent",
        title="Latent DiT on Fashion-MNIST",
        kind="recipe",
        families=("diffusion",),
        paper="arXiv:2112.10752",
    )
    channels: ClassVar[int] = 4
    edge: ClassVar[int] = 7
    patch: ClassVar[int] = 1
    also_measured: ClassVar[str] = "; reconstruction_psnr in decibels, of test images that its VAE encodes and decodes"

    guidance: float = knob(5.0, ge=1, le=20, help="guidance scale of the pictures that are scored; 1 = none")
    steps: int = knob(3500, ge=1, le=1_000_000, help="optimizer steps of the transformer; more = better pictures")
    autoencoder_steps: int = knob(1500, ge=1, le=1_000_000, help="optimizer steps of the VAE; more = sharper pictures")
    autoencoder_width: int = knob(32, ge=8, le=256, multiple_of=8, help="channels of the VAE; more = slower and sharper pictures")
    kl: float = knob(
        3e-5, ge=0, le=1, help="pull of the latents towards a normal distribution; more = easier to draw, coarser when decoded"
    )

    def subject(self, run: TrainingRun, images: NDArray[np.uint8]) -> Subject:
        """The latents [N, 4, 7, 7] of the training images, from a VAE that is trained first."""

        def loss_of(net: nn.Module, step: int) -> Tensor:
            rng = run.rng(PHASE, step)
            rows = rng.integers(0, len(images), self.batch_size)
            return autoencoder_loss(net, pictures(images[rows]), self.kl, rng)

        count = self.autoencoder_steps
        schedule = Schedule(count, self.learning_rate, warmup=min(100, count // 10 + 1), average=AVERAGE)
        vae: Any = fit(run, PHASE, self.autoencoder(), schedule, loss_of)
        round_weights(vae)
        latents = latents_of(vae, images, run.tell)
        scale, shift = 1 / float(latents.std()), float(latents.mean())
        vae.register_to_config(scaling_factor=scale, shift_factor=shift)
        return Subject((latents - shift) * scale, {"vae": vae}, {PHASE: count})

    def more_scores(self, run: TrainingRun, pipeline: Any) -> dict[str, float]:
        """How near decoded pictures are to those that were encoded."""
        few = None if run.examples is None else max(1, run.examples)
        return {"reconstruction_psnr": reconstruction_psnr(pipeline.vae, held_out()[0][:few], run.tell)}

    def autoencoder(self) -> Any:
        """The untrained VAE: convolutions only, at 28, 14 and 7 pixels."""
        from diffusers import AutoencoderKL

        return AutoencoderKL(  # type: ignore[no-untyped-call]
            in_channels=1,
            out_channels=1,
            block_out_channels=(self.autoencoder_width,) * 3,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=self.channels,
            norm_num_groups=8,
            sample_size=28,
            scaling_factor=1.0,
            force_upcast=False,
            mid_block_add_attention=False,
        )
