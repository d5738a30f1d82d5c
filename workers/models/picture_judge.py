"""A classifier of the zoo that looks at drawn pictures: which class it sees, and its features.

Shapes: B pictures [B, C, H, W] from 0 to 1, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from torch import Tensor

from workers.data import fashion
from workers.models.load import load_model
from workers.models.resolve import resolve

ZOO_ID = "fashion-vit"
EDGE = 28
BATCH = 250
REAL = 2000  # real pictures that a Fréchet distance is taken to
LEAST = 100  # pictures below which no Fréchet distance is given


class PictureJudge:
    """The zoo's ViT on Fashion-MNIST. Its features are the CLS token after the last layer [D]."""

    def __init__(self) -> None:
        self.model = load_model(resolve(ZOO_ID), torch.float32).model

    @torch.inference_mode()
    def look(self, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Probabilities of the classes [B, 10] and features [B, D] of pictures [C, H, W], rounded to bytes as a file holds them."""
        found: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(pictures), BATCH):
            x = torch.stack([p.float().mean(0, keepdim=True) for p in pictures[start : start + BATCH]])
            if x.shape[-2:] != (EDGE, EDGE):
                x = torch.nn.functional.interpolate(x, (EDGE, EDGE), mode="bilinear", antialias=True)
            x = (255 * x).round() / 255
            hidden = self.model.vit(pixel_values=(2 * x - 1).expand(-1, 3, -1, -1)).last_hidden_state[:, 0]
            found.append((self.model.classifier(hidden).softmax(-1), hidden))
        return torch.cat([p for p, _ in found]), torch.cat([f for _, f in found])

    @cache  # noqa: B019  (one judge a process)
    def real(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Features of two sets of real test pictures, none in both: the first 2,000, and all after them up to 4,000."""
        images = [torch.from_numpy(i.astype(np.float32) / 255)[None] for i in fashion.held_out()[0][: 2 * REAL]]
        features = self.look(images)[1].double().numpy()
        return features[:REAL], features[REAL:]

    def frechet(self, pictures: Sequence[Tensor]) -> dict[str, float]:
        """Fréchet distance of the pictures' features to those of real ones, and the same for as many real pictures.

        The second number is the noise of the first: what perfect pictures would score at this sample size.
        Nothing below 100 pictures.
        """
        if len(pictures) < LEAST:
            return {}
        reference, others = self.real()
        drawn = self.look(pictures)[1].double().numpy()
        return {
            "frechet_distance": frechet_distance(drawn, reference),
            "frechet_noise": frechet_distance(others[: len(drawn)], reference),
        }


@cache
def _judge() -> PictureJudge:
    return PictureJudge()


def judge_of(labels: Sequence[str]) -> Any:
    """The judge of pictures of these classes; None where the zoo has none."""
    return _judge() if labels and set(labels) <= set(fashion.CLASSES) else None


def frechet_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Distance of two Gaussians fitted to features [N, D] and [M, D].

    Heusel et al. 2017, arXiv:1706.08500, equation 6: ``|m - n|^2 + tr(S + T - 2 (S T)^(1/2))``.
    """
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(sqrtm(s @ t))
    gap = a.mean(0) - b.mean(0)
    return float(max(0.0, gap @ gap + np.trace(s) + np.trace(t) - 2 * np.trace(root)))
