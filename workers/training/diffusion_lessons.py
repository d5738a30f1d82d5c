"""Teaching a denoiser the pictures of classes: what the recipes of small diffusion models share.

Every random number of a step comes from the generator it is given, none from torch's own.

Shapes: B pictures [B, 1, 28, 28] from -1 to 1, or latents in their place [B, C, h, w], labels [B]; one timestep or
noise level a picture.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

LEVELS = 1000  # a noise level from 0 to 1 is told to the denoiser as a timestep from 0 to 1000


def pictures(images: NDArray[np.uint8]) -> Tensor:
    """Grey bytes [B, H, W] as [B, 1, H, W] from -1 to 1.

    They are never mirrored: all shoes point to the left, and that is what is to be learned.
    """
    return torch.from_numpy(images.astype(np.float32))[:, None] / 127.5 - 1


def batch_of(
    images: NDArray[np.uint8] | Tensor, labels: NDArray[np.uint8], size: int, null: int, dropout: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Pictures drawn with replacement, and their labels, some of which are hidden.

    Hiding labels teaches one network with and without classes, which guidance needs (Ho & Salimans 2022,
    arXiv:2207.12598, algorithm 1).

    Args:
        images: grey bytes [N, H, W], or latents [N, C, h, w] that are taken as they are.
        null: the label that stands for no class.
        dropout: share of labels that are replaced by it.
    """
    rows = rng.integers(0, len(images), size)
    shown = np.where(rng.random(size) < dropout, null, labels[rows].astype(np.int64))
    x = images[torch.from_numpy(rows)] if isinstance(images, Tensor) else pictures(images[rows])
    return x, torch.from_numpy(shown)


def noise_like(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Standard normal noise of the shape of ``x``."""
    return torch.from_numpy(rng.standard_normal(tuple(x.shape), dtype=np.float32))


def v_loss(net: nn.Module, scheduler: Any, x: Tensor, labels: Tensor, rng: np.random.Generator) -> Tensor:
    """Mean squared error of the predicted velocity (Salimans & Ho 2022, arXiv:2202.00512, section 4 and appendix D).

    With the scheduler's cumulated alphas a: x_t = sqrt(a) x + sqrt(1 - a) e, and v = sqrt(a) e - sqrt(1 - a) x.

    Args:
        scheduler: of the library, with ``alphas_cumprod``; timesteps are drawn evenly from all of its own.
    """
    alphas = scheduler.alphas_cumprod
    steps = torch.from_numpy(rng.integers(0, len(alphas), len(x)))
    noise = noise_like(x, rng)
    kept = alphas[steps].view(-1, 1, 1, 1)
    target = kept.sqrt() * noise - (1 - kept).sqrt() * x
    return squared_error(net, kept.sqrt() * x + (1 - kept).sqrt() * noise, steps, labels, target)


def flow_loss(net: nn.Module, x: Tensor, labels: Tensor, rng: np.random.Generator) -> Tensor:
    """Mean squared error of the predicted flow on straight paths (Esser et al. 2024, arXiv:2403.03206, section 3.1).

    x_s = (1 - s) x + s e and the target is e - x; the noise level s is the logistic function of a normal number,
    so that the middle of the path is learned most, and is told as the timestep 1000 s, as
    ``FlowMatchEulerDiscreteScheduler`` tells it.
    """
    levels = torch.sigmoid(torch.from_numpy(rng.standard_normal(len(x), dtype=np.float32)))
    noise = noise_like(x, rng)
    s = levels.view(-1, 1, 1, 1)
    return squared_error(net, (1 - s) * x + s * noise, levels * LEVELS, labels, noise - x)


def squared_error(net: nn.Module, noisy: Tensor, steps: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Of what the denoiser predicts in bfloat16 from what it is wanted to."""
    with torch.autocast("cpu", torch.bfloat16):
        predicted = net(noisy, timestep=steps, class_labels=labels, return_dict=False)[0]
    return nn.functional.mse_loss(predicted.float(), target)


def eager_attention(net: nn.Module) -> None:
    """Attention as plain matrix products: on a CPU and at these sizes it trains faster than torch's own.

    The processors are no part of the weights; a loaded model has the library's default again.
    """
    from diffusers.models.attention_processor import Attention, AttnProcessor

    for module in net.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


@torch.no_grad()
def round_weights(net: nn.Module) -> None:
    """Round the parameters to bfloat16 and keep them in float32: what is scored is what is handed over."""
    for weight in net.parameters():
        weight.copy_(weight.bfloat16())
