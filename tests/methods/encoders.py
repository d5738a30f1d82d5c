"""The truth for vision encoders: the library's weights on a copy of its own, layer by layer, in plain sums.

Everything is of one view. Shapes: T tokens, C width, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification, CLIPVisionModel

from tests import tiny_vision
from tests.methods.driving import image_item
from workers.session import Session

ENCODERS: dict[str, Callable[[], Path]] = {
    "vit": tiny_vision.vit_folder,
    "deit": tiny_vision.deit_folder,
    "dinov2": tiny_vision.dinov2_folder,
    "clip_vision": tiny_vision.clip_vision_folder,
}
FRONT = {"vit": 1, "deit": 2, "dinov2": 1, "clip_vision": 1}  # tokens before the first patch
PATCHES = 64
HEADS = 4


@cache
def library(name: str, attention: str = "sdpa") -> Any:
    """A copy that no policy ever touches."""
    kind: Any = {"vit": AutoModelForImageClassification, "deit": AutoModelForImageClassification, "dinov2": AutoModel}.get(
        name, CLIPVisionModel
    )
    with torch.inference_mode(False):  # so that it can be copied anywhere
        return kind.from_pretrained(ENCODERS[name](), dtype=torch.float32, attn_implementation=attention).eval()


def pixels_of(session: Session, picture: Any = None) -> Tensor:
    """What the image processor makes of a picture [1, 3, H, W]."""
    return dict(session.images(images=[image_item("classify", picture=picture).image.open()], return_tensors="pt"))[
        "pixel_values"
    ]  # type: ignore[union-attr]


def module_list(model: Any) -> Any:
    """Where an encoder keeps its layers."""
    base = getattr(model, "vit", None) or getattr(model, "deit", None) or model
    if hasattr(base, "layers"):
        return base.layers
    return base.encoder.layer if hasattr(base.encoder, "layer") else base.encoder.layers


def layers_of(model: Any) -> list[Any]:
    """An encoder's layers."""
    return list(module_list(model))


def embed(model: Any, pixels: Tensor) -> Tensor:
    """Tokens [B, T, C] that enter the first layer."""
    base = getattr(model, "vit", None) or getattr(model, "deit", None) or model
    tokens: Tensor = base.embeddings(pixels)
    return base.pre_layrnorm(tokens) if hasattr(base, "pre_layrnorm") else tokens


def outcome(model: Any, tokens: Tensor) -> Tensor:
    """Class log-probabilities, or the features [width], from the tokens [T, C] behind the last layer."""
    if hasattr(model, "classifier"):
        base = getattr(model, "vit", None) or model.deit
        result: Tensor = model.classifier(base.layernorm(tokens)[0]).log_softmax(-1)
        return result
    norm = model.post_layernorm if hasattr(model, "post_layernorm") else model.layernorm
    features: Tensor = norm(tokens[0])
    return features


def attend(layer: Any, x: Tensor, sizes: list[float] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of a layer on x [T, C]: its result, the keys [H, T, D] and the attention [H, T, T].

    Args:
        sizes: how many patches each token stands for; its logarithm is added to the logits.
    """
    clip = hasattr(layer, "self_attn")
    attention = layer.self_attn if clip else layer.attention
    norm = layer.layer_norm1 if clip else getattr(layer, "layernorm_before", None) or layer.norm1
    read = norm(x)
    q, k, v = (getattr(attention, f"{n}_proj")(read).view(len(x), HEADS, -1).transpose(0, 1) for n in "qkv")
    logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if sizes is not None:
        logits = logits + torch.tensor(sizes).log()
    weights = logits.softmax(-1)
    mixed = (weights @ v).transpose(0, 1).reshape(len(x), -1)
    out = (attention.out_proj if clip else attention.o_proj)(mixed)
    if hasattr(layer, "layer_scale1"):
        out = out * layer.layer_scale1.lambda1
    return x + out, k, weights


def think(layer: Any, x: Tensor) -> Tensor:
    """The second half of a layer on x [T, C]."""
    norm = next(getattr(layer, n) for n in ("layer_norm2", "layernorm_after", "norm2") if hasattr(layer, n))
    out: Tensor = layer.mlp(norm(x))
    return x + (out * layer.layer_scale2.lambda1 if hasattr(layer, "layer_scale2") else out)
