"""Teaching a small VAE to stand for pictures, and what it is worth.

Shapes: N or B pictures [B, 1, 28, 28] from -1 to 1; latents [B, C, h, w].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from workers.training.diffusion_lessons import noise_like, pictures

BATCH = 500
Say = Callable[[str, float | None], None]


def autoencoder_loss(vae: Any, x: Tensor, kl: float, rng: np.random.Generator) -> Tensor:
    """Mean absolute error of decoded pictures, and a little of the latents' distance from a standard normal.

    Rombach et al. 2022, arXiv:2112.10752, section 3.1 (KL-reg.), without its perceptual and adversarial terms. One
    latent is drawn from what the encoder gives (Kingma & Welling 2014, arXiv:1312.6114, section 2.4).

    Args:
        kl: weight of one nat of a picture's divergence, against the mean error of its pixels.
    """
    with torch.autocast("cpu", torch.bfloat16):
        given = vae.encode(x).latent_dist
    mean, log_variance = given.mean.float(), given.logvar.float()
    latents = mean + (log_variance / 2).exp() * noise_like(mean, rng)
    with torch.autocast("cpu", torch.bfloat16):
        decoded = vae.decode(latents, return_dict=False)[0]
    return nn.functional.l1_loss(decoded.float(), x) + kl * divergence(mean, log_variance)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Nats a picture by which normal latents [B, C, h, w] differ from standard ones (arXiv:1312.6114, appendix B)."""
    return (mean**2 + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean() / 2


@torch.no_grad()
def latents_of(vae: Any, images: NDArray[np.uint8], say: Say) -> Tensor:
    """The means [N, C, h, w] that the encoder gives for grey bytes [N, H, W].

    Args:
        say: told before every batch: (text, share done); it may raise to stop.
    """
    found: list[Tensor] = []
    for start in range(0, len(images), BATCH):
        say(f"encoding: {start} of {len(images)} pictures", start / len(images))
        found.append(vae.encode(pictures(images[start : start + BATCH])).latent_dist.mean)
    return torch.cat(found)


@torch.inference_mode()
def reconstruction_psnr(vae: Any, images: NDArray[np.uint8], say: Say) -> float:
    """PSNR in decibels of grey bytes [N, H, W] that were encoded and decoded again; the mean over pictures.

    ``10 log10(1 / mean squared error)`` of values from 0 to 1.

    Args:
        say: told before every batch: (text, share done); it may raise to stop.
    """
    found: list[Tensor] = []
    for start in range(0, len(images), BATCH):
        say(f"decoding: {start} of {len(images)} pictures", start / len(images))
        x = pictures(images[start : start + BATCH])
        decoded = vae.decode(vae.encode(x).latent_dist.mean, return_dict=False)[0].clamp(-1, 1)
        found.append(-10 * ((decoded - x) / 2).pow(2).mean((1, 2, 3)).log10())
    return float(torch.cat(found).mean())
