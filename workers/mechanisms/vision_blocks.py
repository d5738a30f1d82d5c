"""The two halves of an encoder layer, so that tokens can be merged or dropped between them.

For pre-norm layers of the library: ViT, DeiT, DINOv2, CLIP, SigLIP and the encoders of Idefics3 and SmolVLM.

Shapes: B views, T tokens, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from studio_state.errors import Unavailable
from workers.families.parts import ATTENTIONS, child
from workers.mechanisms.vision_attention import VisionForward, active_vision, gather_tokens
from workers.session import Session

Between = Callable[[VisionForward, int, Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """One encoder layer taken apart."""

    norm1: nn.Module
    attention: nn.Module
    scale1: nn.Module | None
    norm2: nn.Module
    mlp: nn.Module
    scale2: nn.Module | None

    def mix(self, hidden: Tensor) -> Tensor:
        """Attention and its residual: [B, T, C]."""
        out = self.attention(self.norm1(hidden), attention_mask=None)[0]
        return hidden + (self.scale1(out) if self.scale1 else out)

    def think(self, hidden: Tensor) -> Tensor:
        """The feed-forward half and its residual: [B, T, C]."""
        out = self.mlp(self.norm2(hidden))
        return hidden + (self.scale2(out) if self.scale2 else out)


def block_of(layer: nn.Module) -> Block:
    """Take a layer apart.

    Raises:
        Unavailable: a layer of another kind.
    """
    norm1 = child(layer, ("layernorm_before", "layer_norm1", "norm1"))
    norm2 = child(layer, ("layernorm_after", "layer_norm2", "norm2"))
    attention, mlp = child(layer, ATTENTIONS), child(layer, ("mlp",))
    if norm1 is None or norm2 is None or attention is None or mlp is None:
        raise Unavailable(
            f"image tokens can be merged or dropped in layers of the ViT, DeiT, DINOv2, CLIP and SigLIP kind; this encoder has "
            f"{type(layer).__name__}, choose another model"
        )
    return Block(norm1, attention, child(layer, ("layer_scale1",)), norm2, mlp, child(layer, ("layer_scale2",)))


@contextmanager
def between_halves(session: Session, act: Between, layers: int | None = None) -> Iterator[None]:
    """Have ``act`` change the tokens between attention and feed-forward of encoder layers.

    Args:
        act: (encoder pass, index of the layer, hidden [B, T, C]) -> hidden [B, T', C].
        layers: only in the first so many layers; None = in all.
    """
    names = session.family.parts(session.model)["vision_layers"][:layers]

    def rerouted(index: int, block: Block) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
            vision = active_vision()
            if vision is None or (attention_mask is not None and hides(attention_mask)):
                raise Unavailable(
                    "this image is padded inside the encoder, where tokens cannot be merged or dropped; pad it before"
                )
            return block.think(act(vision, index, block.mix(hidden_states)))

        return forward

    blocks = {name: rerouted(i, block_of(session.model.get_submodule(name))) for i, name in enumerate(names)}
    with session.rerouted(blocks):
        yield


def hides(mask: Tensor) -> bool:
    """True if a mask (bools, or additive) hides any token."""
    return not bool(mask.all()) if mask.dtype == torch.bool else bool((mask < 0).any())


def feature_layers(session: Session) -> int:
    """Encoder layers whose work reaches the output: all, or those up to the layer a VLM takes its features from."""
    layers = len(session.family.parts(session.model)["vision_layers"])
    named = getattr(session.model.config, "vision_feature_layer", None)
    if not isinstance(named, int):
        return layers
    return named if named >= 0 else layers + 1 + named


def patches_of(vision: VisionForward, x: Tensor) -> Tensor:
    """Features of all patches that came in [B, P, C], from those of the tokens that are left.

    Args:
        x: [B, T or T - extra, C]; CLS and the like may have been cut off already.
    """
    if vision.source is None:
        return x
    source = vision.source
    extra = int(source.max()) + 1 - x.shape[1]  # tokens before the first patch that were cut off
    return gather_tokens(x, (source[:, extra:] - extra).clamp_min(0))
