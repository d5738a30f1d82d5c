"""Attention inside a vision encoder: who looks, and how merged tokens are weighed.

Encoders keep no cache, so this is apart from the language models' attention. While a
:class:`VisionForward` is active, the registered attention function hands its calls here.

Shapes: B views (images or tiles), H heads, T tokens (CLS first, where there is one), D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


@dataclass
class VisionCall:
    """What an observer sees after the attention of one encoder layer.

    Attributes:
        query, key: [B, H, T, D].
    """

    layer: int
    query: Tensor
    key: Tensor
    scaling: float
    forward: VisionForward

    def cls_attention(self) -> Tensor:
        """How much CLS attends to each other token: softmax over all tokens, summed over heads: [B, T - 1] (float32)."""
        logits = (self.query[:, :, :1].float() @ self.key.float().transpose(2, 3)) * self.scaling  # [B, H, 1, T]
        if self.forward.sizes is not None:
            logits = logits + self.forward.sizes.float().log()[:, None, None]
        return logits.softmax(-1).sum(1)[:, 0, 1:]


@dataclass
class VisionForward:
    """One pass of a vision encoder.

    Attributes:
        layers: attention module -> index of its layer.
        observers: called after every attention.
        sizes: [B, T] how many patches each token stands for, where tokens were merged; attention counts them all.
        source: [B, T0] which token now stands for each token that came in, where some were merged; -1 = dropped.
        layers_seen: [B, T0] share of the layers that worked on each token that came in, where some were dropped.
    """

    layers: dict[nn.Module, int]
    observers: Sequence[Callable[[VisionCall], None]] = ()
    sizes: Tensor | None = None
    source: Tensor | None = None
    layers_seen: Tensor | None = None

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The library's attention with merged tokens weighed by their size (ToMe, arXiv:2210.09461, section 3)."""
        if self.sizes is not None:
            weight = self.sizes.log().to(query.dtype)[:, None, None]
            mask = weight.expand(-1, -1, query.shape[2], -1) if mask is None else mask + weight
        out, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
        layer = self.layers.get(module)
        if layer is not None and self.observers:
            call = VisionCall(layer, query, key, scaling if scaling is not None else query.shape[-1] ** -0.5, self)
            for observe in self.observers:
                observe(call)
        return out, None


_active: ContextVar[VisionForward | None] = ContextVar("pareto_vision", default=None)


@contextmanager
def seeing(forward: VisionForward) -> Iterator[VisionForward]:
    """Everything that an encoder attends to inside belongs to this forward."""
    token = _active.set(forward)
    try:
        yield forward
    finally:
        _active.reset(token)


def active_vision() -> VisionForward | None:
    """The encoder pass under way."""
    return _active.get()


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` [B, n] of x [B, T, C]."""
    return torch.gather(x, 1, index[..., None].expand(-1, -1, x.shape[-1]))
