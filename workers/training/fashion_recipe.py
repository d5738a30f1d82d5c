"""What the recipes for small diffusion models of Fashion-MNIST share: data, labels, steps, scores.

Shapes: B batch, grey images [B, 1, 28, 28] from -1 to 1, or what stands for them [B, C, h, w].
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from workers.cards import knob
from workers.data.fashion import CLASSES, read_split
from workers.recipe import Recipe, Trained, hand_over
from workers.training.class_agreement import SAMPLING_STEPS, pictures_a_class, sample_and_judge
from workers.training.diffusion_lessons import batch_of, eager_attention, flow_loss, round_weights
from workers.training.loop import Schedule, TrainingRun, fit

NULL = len(CLASSES)  # the label that stands for no class
HEAD = 32  # of the transformers: width of a head
PHASE = "draw"


@dataclass(frozen=True)
class Subject:
    """What a denoiser learns to draw.

    Attributes:
        values: grey bytes [N, 28, 28], or numbers that stand for them [N, C, h, w].
        parts: of the pipeline, beside the denoiser and the scheduler.
        steps: of the phases that made them.
    """

    values: NDArray[np.uint8] | Tensor
    parts: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)


class FashionRecipe(Recipe):
    """A pipeline that draws clothes; subclasses say which denoiser, how it is taught, and what it draws."""

    part: ClassVar[str]  # the denoiser's name in the pipeline
    warmup: ClassVar[int]  # steps at most
    also_measured: ClassVar[str] = ""  # words on further scores, for the model card

    data: str = knob(
        "/usr/share/datasets/fashion-mnist", help="folder with the published training files (train-images-idx3-ubyte.gz, ...)"
    )
    steps: int = knob(4500, ge=1, le=1_000_000, help="optimizer steps; more = better pictures")
    batch_size: int = knob(64, ge=1, le=4096, help="images a step")
    learning_rate: float = knob(1e-3, gt=0, le=0.1, help="highest learning rate")
    label_dropout: float = knob(0.15, ge=0, le=0.9, help="share of labels hidden, so that it can be guided; 0 = it cannot")
    guidance: float = knob(1.5, ge=1, le=20, help="guidance scale of the pictures that are scored; 1 = none")

    @abstractmethod
    def model(self) -> Any:
        """The untrained denoiser."""

    @abstractmethod
    def scheduler(self) -> Any:
        """The library's scheduler that is handed over with it."""

    @abstractmethod
    def loss(self, net: nn.Module, scheduler: Any, x: Tensor, labels: Tensor, rng: np.random.Generator) -> Tensor:
        """What a step makes smaller, for pictures or what stands for them [B, C, h, w]."""

    def subject(self, run: TrainingRun, images: NDArray[np.uint8]) -> Subject:
        """What is drawn: the pixels of the training images themselves."""
        return Subject(images)

    def more_scores(self, run: TrainingRun, pipeline: Any) -> dict[str, float]:
        """Scores beside the class agreement."""
        return {}

    def train(self, run: TrainingRun) -> Trained:
        """Train on the 60,000 images, then let the studio's classifier judge pictures from fixed seeds."""
        from workers.families.class_pipeline import ClassConditionalPipeline

        images, labels = read_split(Path(self.data), "train")
        torch.manual_seed(run.seed)
        subject = self.subject(run, images)
        model, scheduler = self.model(), self.scheduler()

        def loss_of(net: nn.Module, step: int) -> Tensor:
            rng = run.rng(PHASE, step)
            x, shown = batch_of(subject.values, labels, self.batch_size, NULL, self.label_dropout, rng)
            return self.loss(net, scheduler, x, shown, rng)

        schedule = Schedule(self.steps, self.learning_rate, warmup=min(self.warmup, self.steps // 10 + 1))
        best: Any = fit(run, PHASE, model, schedule, loss_of)
        round_weights(best)
        parts = {"scheduler": scheduler, self.part: best, **subject.parts}
        pipeline = ClassConditionalPipeline(**parts, id2label=dict(enumerate(CLASSES)))
        each = pictures_a_class(run.examples)
        scores = sample_and_judge(pipeline, each, guidance=self.guidance, say=run.tell)
        return hand_over(
            run,
            self,
            pipeline,
            steps={**subject.steps, PHASE: self.steps},
            scores={**scores, **self.more_scores(run, pipeline)},
            examples=each * len(CLASSES),
            measured_on=f"pictures from fixed seeds ({SAMPLING_STEPS} steps, guidance {self.guidance:g}), as fashion-vit names them"
            + self.also_measured,
            data="Fashion-MNIST, 60,000 labelled training images (Zalando Research, MIT licence)",
            licence="MIT",
            limits="It draws ten kinds of clothes at 28 x 28 pixels, grey on black, and nothing else.",
        )


class FashionFlowRecipe(FashionRecipe):
    """A diffusion transformer that is taught by flow matching; subclasses say on what it works."""

    part: ClassVar[str] = "transformer"
    warmup: ClassVar[int] = 500
    channels: ClassVar[int]  # of what it draws
    edge: ClassVar[int]  # of what it draws
    patch: ClassVar[int]  # edge of what becomes one token

    layers: int = knob(6, ge=1, le=48, help="transformer layers; more = slower and better")
    width: int = knob(192, ge=32, le=1024, multiple_of=32, help="hidden size; more = slower and better")

    def scheduler(self) -> Any:
        """Euler steps along the flow."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler()  # type: ignore[no-untyped-call]

    def loss(self, net: nn.Module, scheduler: Any, x: Tensor, labels: Tensor, rng: np.random.Generator) -> Tensor:
        """The predicted flow's error."""
        return flow_loss(net, x, labels, rng)

    def model(self) -> Any:
        """The untrained network."""
        from diffusers import DiTTransformer2DModel

        net: Any = DiTTransformer2DModel(  # type: ignore[no-untyped-call]
            num_attention_heads=self.width // HEAD,
            attention_head_dim=HEAD,
            in_channels=self.channels,
            out_channels=self.channels,
            num_layers=self.layers,
            sample_size=self.edge,
            patch_size=self.patch,
            num_embeds_ada_norm=NULL,
        )
        start_as_identity(net)
        eager_attention(net)
        return net


def start_as_identity(net: Any) -> None:
    """Begin as the paper does (section 3.2): every block passes its input on, and the output is zero.

    Peebles & Xie 2023, arXiv:2212.09748. The library's blocks also hide labels at random while they train, each block
    others; here the labels of a batch are hidden once, by :func:`batch_of`.
    """
    for block in net.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    for last in (net.proj_out_1, net.proj_out_2):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
