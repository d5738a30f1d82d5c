"""A small vision transformer that names clothes: the studio's labelled ViT.

Shapes: B batch, 28 x 28 grey images repeated to three channels; patch 4 gives 49 patches + CLS.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from studio_state.catalog import Card
from workers.data.fashion import CLASSES, held_out, read_split
from workers.methods import card, knob
from workers.recipe import Recipe, Trained, hand_over
from workers.training.loop import Schedule, TrainingRun, fit

SHIFT = 2  # pixels an image is moved by at most, each way


class FashionViT(Recipe):
    """Train a small ViT on Fashion-MNIST.

    Dosovitskiy et al. 2021, arXiv:2010.11929, at 28 x 28 pixels: patch 4, width 128. Images are
    flipped and moved by up to two pixels; the moving average of the weights is handed over.
    """

    card: ClassVar[Card] = card(
        id="fashion-vit", title="ViT on Fashion-MNIST", kind="recipe", families=("vit",), paper="arXiv:2010.11929"
    )

    data: str = knob(
        "/usr/share/datasets/fashion-mnist", help="folder with the published training files (train-images-idx3-ubyte.gz, ...)"
    )
    steps: int = knob(28000, ge=1, le=1_000_000, help="optimizer steps; more = better, up to about 40 passes over the data")
    batch_size: int = knob(64, ge=1, le=4096, help="images a step")
    learning_rate: float = knob(1e-3, gt=0, le=0.1, help="highest learning rate")
    layers: int = knob(6, ge=1, le=48, help="transformer layers; more = slower and better")
    width: int = knob(128, ge=32, le=1024, multiple_of=32, help="hidden size; more = slower and better")

    def train(self, run: TrainingRun) -> Trained:
        """Train on the 60,000 images, score the 10,000 that ship with the studio."""
        images, labels = read_split(Path(self.data), "train")
        torch.manual_seed(run.seed)
        model = self.model()

        def loss_of(net: nn.Module, step: int) -> Tensor:
            rng = run.rng("classify", step)
            rows = rng.integers(0, len(images), self.batch_size)
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(pixel_values=pixels(moved(images[rows], rng))).logits
            target = torch.from_numpy(labels[rows].astype(np.int64))
            return nn.functional.cross_entropy(logits.float(), target, label_smoothing=0.1)

        schedule = Schedule(self.steps, self.learning_rate, warmup=min(500, self.steps // 10 + 1))
        best = fit(run, "classify", model, schedule, loss_of).to(torch.bfloat16)
        processor().save_pretrained(run.out)
        share, examples = accuracy(best, run.tell, run.examples)
        return hand_over(
            run,
            self,
            best,
            steps={"classify": self.steps},
            scores={"accuracy": share},
            examples=examples,
            data="Fashion-MNIST, 60,000 labelled training images (Zalando Research, MIT licence)",
            licence="MIT",
            limits="It knows ten kinds of clothes at 28 x 28 pixels, grey on black, and nothing else.",
        )

    def model(self) -> Any:
        """The untrained network; eager attention trains fastest on a CPU."""
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 32,
            intermediate_size=3 * self.width,
            image_size=28,
            patch_size=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=dict(enumerate(CLASSES)),
            label2id={name: i for i, name in enumerate(CLASSES)},
            attn_implementation="eager",
        )
        return ViTForImageClassification(config)


def processor() -> Any:
    """The image processor that belongs to the weights: 28 x 28, values from -1 to 1."""
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def moved(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image [B, 28, 28] flipped or not, and moved by up to two pixels."""
    flip = rng.random(len(images)) < 0.5
    images = np.where(flip[:, None, None], images[:, :, ::-1], images)
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (28, 28), axis=(1, 2))  # [B, 5, 5, 28, 28]
    at = rng.integers(0, 2 * SHIFT + 1, (2, len(images)))
    return windows[np.arange(len(images)), at[0], at[1]]


def pixels(images: np.ndarray) -> Tensor:
    """Grey bytes [B, 28, 28] as the network's input [B, 3, 28, 28], from -1 to 1."""
    x = torch.from_numpy(images.astype(np.float32)) / 127.5 - 1
    return x[:, None].expand(-1, 3, -1, -1)


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    say: Callable[[str, float | None], None] = lambda text, done: None,
    examples: int | None = None,
    batch: int = 500,
) -> tuple[float, int]:
    """Share of the 10,000 test images (or of the first ``examples``) that are named rightly, and how many they are."""
    images, labels = (x[:examples] for x in held_out())
    dtype = next(model.parameters()).dtype
    right = 0
    for start in range(0, len(images), batch):
        say(f"scoring: {start} of {len(images)} images", start / len(images))
        logits = model(pixel_values=pixels(images[start : start + batch]).to(dtype)).logits
        right += int((logits.argmax(-1).numpy() == labels[start : start + batch]).sum())
    return right / len(images), len(images)
