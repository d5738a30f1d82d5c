"""A small diffusion transformer that draws clothes from noise: the studio's flow-matching model.

Shapes: B batch, grey images [B, 1, 28, 28] from -1 to 1; patch 4 gives 49 tokens.
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
from workers.training.diffusion_lessons import batch_of, eager_attention, flow_loss, round_weights
from workers.training.loop import Schedule, TrainingRun, fit

NULL = len(CLASSES)
PATCH, HEAD = 4, 32


class FashionDiT(Recipe):
    """Train a small class-conditional diffusion transformer on Fashion-MNIST.

    Peebles & Xie 2023, arXiv:2212.09748 (DiT with adaLN-zero blocks), at 28 x 28 pixels in patches of 4, without a
    VAE, taught by flow matching with noise levels from the middle (Esser et al. 2024, arXiv:2403.03206) in the place
    of the paper's noise prediction. The moving average of the weights is handed over with an Euler scheduler.
    """

    card: ClassVar[Card] = card(
        id="fashion-dit", title="DiT on Fashion-MNIST", kind="recipe", families=("diffusion",), paper="arXiv:2212.09748"
    )

    data: str = knob(
        "/usr/share/datasets/fashion-mnist", help="folder with the published training files (train-images-idx3-ubyte.gz, ...)"
    )
    steps: int = knob(7000, ge=1, le=1_000_000, help="optimizer steps; more = better pictures")
    batch_size: int = knob(64, ge=1, le=4096, help="images a step")
    learning_rate: float = knob(1e-3, gt=0, le=0.1, help="highest learning rate")
    label_dropout: float = knob(0.15, ge=0, le=0.9, help="share of labels hidden, so that it can be guided; 0 = it cannot")
    layers: int = knob(6, ge=1, le=48, help="transformer layers; more = slower and better")
    width: int = knob(192, ge=32, le=1024, multiple_of=32, help="hidden size; more = slower and better")
    guidance: float = knob(1.5, ge=1, le=20, help="guidance scale of the pictures that are scored; 1 = none")

    def train(self, run: TrainingRun) -> Trained:
        """Train on the 60,000 images, then let the studio's classifier judge pictures from fixed seeds."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        from workers.families.class_pipeline import ClassConditionalPipeline

        images, labels = read_split(Path(self.data), "train")
        torch.manual_seed(run.seed)
        model = self.model()

        def loss_of(net: nn.Module, step: int) -> Tensor:
            rng = run.rng("draw", step)
            x, shown = batch_of(images, labels, self.batch_size, NULL, self.label_dropout, rng)
            return flow_loss(net, x, shown, rng)

        schedule = Schedule(self.steps, self.learning_rate, warmup=min(500, self.steps // 10 + 1))
        best: Any = fit(run, "draw", model, schedule, loss_of)
        round_weights(best)
        flow: Any = FlowMatchEulerDiscreteScheduler()  # type: ignore[no-untyped-call]
        pipeline = ClassConditionalPipeline(scheduler=flow, transformer=best, id2label=dict(enumerate(CLASSES)))
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
        """The untrained network."""
        from diffusers import DiTTransformer2DModel

        net: Any = DiTTransformer2DModel(  # type: ignore[no-untyped-call]
            num_attention_heads=self.width // HEAD,
            attention_head_dim=HEAD,
            in_channels=1,
            out_channels=1,
            num_layers=self.layers,
            sample_size=28,
            patch_size=PATCH,
            num_embeds_ada_norm=NULL,
        )
        start_as_identity(net)
        eager_attention(net)
        return net


def start_as_identity(net: Any) -> None:
    """Begin as the paper does (section 3.2): every block passes its input on, and the output is zero.

    The library's blocks also hide labels at random while they train, each block others; here the labels of a batch
    are hidden once, by :func:`batch_of`.
    """
    for block in net.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    for last in (net.proj_out_1, net.proj_out_2):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
