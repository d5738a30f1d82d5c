"""A small UNet that draws clothes from noise: the studio's pixel diffusion model.

Shapes: B batch, grey images [B, 1, 28, 28] from -1 to 1; levels of 28, 14 and 7 pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from studio_state.catalog import Card
from workers.data.fashion import CLASSES, read_split
from workers.methods import card, knob
from workers.recipe import Recipe, Trained, hand_over
from workers.training.class_agreement import SAMPLING_STEPS, pictures_a_class, sample_and_judge
from workers.training.diffusion_lessons import batch_of, eager_attention, round_weights, v_loss
from workers.training.loop import Schedule, TrainingRun, fit

NULL = len(CLASSES)


class FashionUNet(Recipe):
    """Train a small class-conditional UNet on Fashion-MNIST.

    Ho et al. 2020, arXiv:2006.11239, with the cosine schedule (arXiv:2102.09672), velocity prediction
    (arXiv:2202.00512) and labels hidden now and then for guidance (arXiv:2207.12598), in 1,000 steps of noise
    at 28 x 28 pixels. The moving average of the weights is handed over with a DDIM scheduler.
    """

    card: ClassVar[Card] = card(
        id="fashion-unet", title="UNet on Fashion-MNIST", kind="recipe", families=("diffusion",), paper="arXiv:2006.11239"
    )

    data: str = knob(
        "/usr/share/datasets/fashion-mnist", help="folder with the published training files (train-images-idx3-ubyte.gz, ...)"
    )
    steps: int = knob(4500, ge=1, le=1_000_000, help="optimizer steps; more = better pictures")
    batch_size: int = knob(64, ge=1, le=4096, help="images a step")
    learning_rate: float = knob(1e-3, gt=0, le=0.1, help="highest learning rate")
    label_dropout: float = knob(0.15, ge=0, le=0.9, help="share of labels hidden, so that it can be guided; 0 = it cannot")
    width: int = knob(32, ge=8, le=256, multiple_of=8, help="channels at 28 pixels, two and three times as many below")
    guidance: float = knob(1.5, ge=1, le=20, help="guidance scale of the pictures that are scored; 1 = none")

    def train(self, run: TrainingRun) -> Trained:
        """Train on the 60,000 images, then let the studio's classifier judge pictures from fixed seeds."""
        from workers.families.class_pipeline import ClassConditionalPipeline

        images, labels = read_split(Path(self.data), "train")
        torch.manual_seed(run.seed)
        model, noise = self.model(), scheduler()

        def loss_of(net: nn.Module, step: int) -> Tensor:
            rng = run.rng("draw", step)
            x, shown = batch_of(images, labels, self.batch_size, NULL, self.label_dropout, rng)
            return v_loss(net, noise, x, shown, rng)

        schedule = Schedule(self.steps, self.learning_rate, warmup=min(200, self.steps // 10 + 1))
        best: Any = fit(run, "draw", model, schedule, loss_of)
        round_weights(best)
        pipeline = ClassConditionalPipeline(scheduler=noise, unet=best, id2label=dict(enumerate(CLASSES)))
        each = pictures_a_class(run.examples)
        scores = sample_and_judge(pipeline, each, guidance=self.guidance, say=run.tell)
        return hand_over(
            run,
            self,
            pipeline,
            steps={"draw": self.steps},
            scores=scores,
            examples=each * len(CLASSES),
            measured_on=f"pictures from fixed seeds ({SAMPLING_STEPS} steps, guidance {self.guidance:g}), as fashion-vit names them",
            data="Fashion-MNIST, 60,000 labelled training images (Zalando Research, MIT licence)",
            licence="MIT",
            limits="It draws ten kinds of clothes at 28 x 28 pixels, grey on black, and nothing else.",
        )

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


def scheduler() -> Any:
    """DDIM; its steps start at the last timestep, whose sample is noise alone (Lin et al. 2023, arXiv:2305.08891)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(  # type: ignore[no-untyped-call]
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=True, timestep_spacing="trailing"
    )
