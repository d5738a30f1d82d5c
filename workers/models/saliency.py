"""A saliency head: from the tokens of a vision encoder to a map of what catches the eye.

It is stored beside the encoder's weights, in a file of its own, so that the encoder stays a plain model of the library.
Shapes: B images, T tokens (CLS first), P = T - 1 patches in reading order, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from studio_state.errors import ModelError
from workers.models.talk import first_line

HEAD_FILE = "saliency_head.safetensors"
MAP_SIDE = 224
AnyModule = TypeVar("AnyModule", bound=nn.Module)

_COUNTER = "num_batches_tracked"  # of batch normalisation, of use in training only and not stored


class SaliencyHead(nn.Module):
    """Three transposed convolutions, each doubling the side, and a 1x1 convolution; the names are those of its publisher."""

    def __init__(self) -> None:
        super().__init__()
        self.upconv1, self.bn1 = _doubling(384, 256)
        self.upconv2, self.bn2 = _doubling(256, 128)
        self.upconv3, self.bn3 = _doubling(128, 64)
        self.final_conv = nn.Conv2d(64, 1, kernel_size=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps [B, 224, 224] in 0..1 of the encoder's last hidden state [B, T, 384] (after its final norm).

        The head was trained on 16 x 16 patches; other squares work as well.

        Raises:
            ValueError: the patches do not make a square, for example because some were taken away.
        """
        patches = tokens[:, 1:]
        side = math.isqrt(patches.shape[1])
        if side * side != patches.shape[1] or not side:
            raise ValueError(f"a saliency map needs patches that make a square; there are {patches.shape[1]}")
        x = patches.transpose(1, 2).reshape(len(tokens), -1, side, side)
        x = self.bn1(self.upconv1(x)).relu()
        x = self.bn2(self.upconv2(x)).relu()
        x = self.bn3(self.upconv3(x)).relu()
        x = F.interpolate(self.final_conv(x), size=(MAP_SIDE, MAP_SIDE), mode="bilinear", align_corners=False)
        return x.sigmoid()[:, 0]


def _doubling(wide: int, narrow: int) -> tuple[nn.ConvTranspose2d, nn.BatchNorm2d]:
    return nn.ConvTranspose2d(wide, narrow, kernel_size=4, stride=2, padding=1), nn.BatchNorm2d(narrow)


def load_saliency_head(folder: Path) -> SaliencyHead | None:
    """The head of a model folder: float32, on the CPU, frozen, in eval mode; None if the folder has none.

    Raises:
        ModelError: its file is damaged, or of another head.
    """
    file = folder / HEAD_FILE
    if not file.is_file():
        return None
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as e:
        raise ModelError(f"{file} cannot be read ({first_line(e)}); copy or download it again") from e
    with torch.device("meta"):
        head = SaliencyHead()
    if wrong := misfits(weights, head):
        raise ModelError(f"{file} is not of the saliency head that the studio knows: {wrong}; copy or download it again")
    return fill(head, weights).requires_grad_(False)


def fill(module: AnyModule, weights: Mapping[str, Tensor]) -> AnyModule:
    """A module made on the meta device, with these weights, which :func:`misfits` found right; in eval mode."""
    counters = {name: torch.tensor(0) for name in module.state_dict() if name.endswith(_COUNTER)}
    module.load_state_dict({**weights, **counters}, assign=True)
    return module.eval()


def misfits(weights: Mapping[str, Tensor], module: nn.Module) -> str:
    """What keeps these weights from being all that a module needs, in words; empty if nothing does."""
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items() if not name.endswith(_COUNTER)}
    given = {name: tuple(t.shape) for name, t in weights.items()}
    if missing := sorted(wanted.keys() - given.keys()):
        return f"it lacks {len(missing)} of {len(wanted)} weights (first: {missing[0]})"
    if surplus := sorted(given.keys() - wanted.keys()):
        return f"it has {len(surplus)} weights too many (first: {surplus[0]})"
    if other := sorted(name for name in wanted if wanted[name] != given[name]):
        return f"{other[0]} has the shape {list(given[other[0]])}, expected {list(wanted[other[0]])}"
    return ""
