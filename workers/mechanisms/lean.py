"""Decode steps without the library's per-step Python: the same mathematics in as few and as fast calls as it takes.

For decoder layers of the Llama kind (:data:`~workers.models.info.LEAN_SHAPES`). Keys, values, masks and
observers go through the one attention function, linear maps may be anything that stands in the model
(plain or replaced), so KV and weight policies compose with it. A layer that a policy replaced or looks
into runs as the library's own.

Shapes: B batch, T new tokens, C hidden width, Hq query heads, H key-value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.mechanisms import onednn
from workers.mechanisms.attention import Forward, attend, forwarding
from workers.mechanisms.fusing import Fused, fuse, is_hooked
from workers.mechanisms.lean_maps import Shape, ends_of, gather, head_of, packed_maps, shape_of
from workers.mechanisms.lean_rows import HeadRows, LeanRows, LeanStep
from workers.mechanisms.lean_shape import check_outside, is_lean, window
from workers.mechanisms.linear import DenseLinear
from workers.session import Session

Linear = Callable[[Tensor], Tensor]
Rotary = tuple[Tensor, Tensor]
Layer = Callable[[Tensor, Rotary, Forward], Tensor]
FUSED = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
GROWING_ROTARY = ("dynamic", "longrope")  # kinds of rotary embedding whose angles depend on the length seen so far


class Norm:
    """RMSNorm by way of the vector norm, in float32 as in the library: fewer operations, equal up to the order of a sum."""

    def __init__(self, module: Any):
        self.weight, self.eps = module.weight, module.variance_epsilon
        self.floor, self.share = torch.tensor(self.eps, device=self.weight.device), 1 / self.weight.shape[-1]

    def __call__(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scaled = x * torch.addcmul(self.floor, norm, norm, value=self.share).rsqrt_()
        return scaled.to(x.dtype).mul_(self.weight)


class RotaryTable:
    """Cosines and sines of all positions, computed by the library's own module and looked up once a step.

    The first half of the sines is negated, so that rotating is ``x * cos + roll(x, D / 2) * sin``.
    """

    def __init__(self, module: nn.Module, like: Tensor):
        self.module, self.like = module, like
        self.fixed = getattr(module, "rope_type", "default") not in GROWING_ROTARY
        self.cos = self.sin = like.new_zeros(0)

    def at(self, positions: Tensor, seen: int) -> Rotary:
        """Cosines and signed sines [B, T, 1, D] of positions [B, T], all below ``seen``."""
        if not self.fixed:
            cos, sin = self._compute(positions)
        else:
            cos, sin = (x[positions] for x in self.table(seen))
        return cos.unsqueeze(2), sin.unsqueeze(2)

    def table(self, seen: int) -> Rotary:
        """Cosines and signed sines [>= seen, D] of all positions, where they are fixed."""
        if seen > self.cos.shape[0]:
            length = max(256, 1 << (seen - 1).bit_length())
            cos, sin = self._compute(torch.arange(length, device=self.like.device)[None])
            self.cos, self.sin = cos[0], sin[0]
        return self.cos, self.sin

    def _compute(self, positions: Tensor) -> Rotary:
        cos, sin = self.module(self.like, position_ids=positions)
        return cos, negate_half(sin)


def negate_half(sin: Tensor) -> Tensor:
    """Sines [..., D] with the first half negated, and back again."""
    half = sin.shape[-1] // 2
    return torch.cat((-sin[..., :half], sin[..., half:]), -1)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of x [B, T, H, D]."""
    cos, sin = rotary
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))


class LeanLayer:
    """One decoder layer: hidden states [B, T, C] -> [B, T, C].

    Args:
        module: the library's layer.
        qkv, gate_up: its fused inputs.

    Attributes:
        maps: the linear maps: fused queries, keys and values; outputs; fused gate and up; down.
    """

    def __init__(self, module: Any, qkv: nn.Module, gate_up: nn.Module):
        attention = module.self_attn
        self.maps = (qkv, attention.o_proj, gate_up, module.mlp.down_proj)
        self.index: int = attention.layer_idx
        self.scaling: float = attention.scaling
        self.window: int | None = window(attention)
        self.width: int = attention.head_dim
        self.kv_heads: int = attention.config.num_key_value_heads
        self.query_heads: int = self.kv_heads * attention.num_key_value_groups
        self.head_norm = HeadNorm(attention, self.query_heads, self.kv_heads) if hasattr(attention, "q_norm") else None
        self.norm_in, self.norm_mlp = Norm(module.input_layernorm), Norm(module.post_attention_layernorm)
        self.qkv, self.out, self.gate_up, self.down = map(direct, self.maps)

    def __call__(self, hidden: Tensor, rotary: Rotary, forward: Forward) -> Tensor:
        b, t, _ = hidden.shape
        heads = self.qkv(self.norm_in(hidden)).view(b, t, -1, self.width)
        turned, value = torch.split_with_sizes(heads, (self.query_heads + self.kv_heads, self.kv_heads), 2)
        if self.head_norm is not None:
            turned = self.head_norm(turned)
        query, key = torch.split_with_sizes(rotate(turned, rotary).transpose(1, 2), (self.query_heads, self.kv_heads), 1)
        mixed = attend(forward, self.index, query, key, value.transpose(1, 2), self.scaling, self.window)
        hidden = hidden + self.out(mixed.reshape(b, t, -1))
        gate, up = self.gate_up(self.norm_mlp(hidden)).chunk(2, -1)
        return hidden + self.down(F.silu(gate).mul_(up))


class HeadNorm:
    """Norms of queries and keys (Qwen3) in one call on [B, T, Hq + H, D]."""

    def __init__(self, attention: Any, query_heads: int, kv_heads: int):
        q, k = attention.q_norm, attention.k_norm
        self.weight = torch.cat((q.weight.expand(query_heads, -1), k.weight.expand(kv_heads, -1)))
        self.shape, self.eps = (self.weight.shape[-1],), q.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.shape, None, self.eps) * self.weight


class HookedLayer:
    """A lean layer whose module carries hooks: they see the arguments and the output that the library would give."""

    def __init__(self, module: nn.Module, lean: LeanLayer):
        self.module, self.lean = module, lean

    def __call__(self, hidden: Tensor, rotary: Rotary, forward: Forward) -> Tensor:
        def run(hidden_states: Tensor, position_embeddings: Rotary, **kwargs: Any) -> Tensor:
            cos, sin = position_embeddings  # as the hooks left them
            return self.lean(hidden_states, (cos.unsqueeze(2), negate_half(sin).unsqueeze(2)), forward)

        self.module.forward = run  # type: ignore[method-assign]
        try:
            return call_as_library(self.module, hidden, rotary, forward)
        finally:
            del self.module.forward


class LibraryLayer:
    """A layer that is not of the lean shape any more, run as it is."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, hidden: Tensor, rotary: Rotary, forward: Forward) -> Tensor:
        with forwarding(forward):
            return call_as_library(self.module, hidden, rotary, forward)


def call_as_library(module: nn.Module, hidden: Tensor, rotary: Rotary, forward: Forward) -> Tensor:
    """Call a decoder layer with the arguments that the library gives it."""
    cos, sin = (x.squeeze(2) for x in rotary)
    out: Tensor = module(
        hidden,
        attention_mask=None,
        position_embeddings=(cos, negate_half(sin)),
        position_ids=forward.positions,
        past_key_values=forward.cache,
        use_cache=True,
    )
    return out


class LeanModel:
    """All layers of a model, as they stand when this is made.

    Fused weights are built once per experiment and set of parts (``session.once``); the rest is made anew at
    every attach, because hooks may have come or gone.

    Attributes:
        lean_layers: layers that do not run as the library's own.
        swaps: qualified name -> stand-in, to be put into the model for as long as this is used.
    """

    def __init__(self, session: Session):
        model: Any = session.model
        base = session.family.backbone(model)
        check_outside(model, base)
        self.swaps: dict[str, nn.Module] = {}
        self.embed: nn.Module = base.embed_tokens
        self.rotary: RotaryTable = session.once(
            (RotaryTable, base.rotary_emb), lambda: RotaryTable(base.rotary_emb, base.norm.weight)
        )
        names = session.family.parts(model)["layers"]
        layers = [self._layer(session, name, model.get_submodule(name)) for name in names]
        self.lean_layers = sum(not isinstance(x, LibraryLayer) for x in layers)
        head = model.get_output_embeddings()
        packed = packed_maps([*(m for layer in layers if type(layer) is LeanLayer for m in layer.maps), head])
        session.once((gather, *packed), lambda: gather(packed))
        self.layers = native_where_possible(layers)
        self.norm, self.head = Norm(base.norm), direct(head)
        shape = head_of(self.norm, head)
        self.native_head = None if shape is None else HeadRows(shape)
        self.whole = None if shape is None else self._whole(shape)

    def _whole(self, head: Shape) -> LeanStep | None:
        """The step in one call; None where some part of the model is not of the kind that the kernel knows."""
        first = self.layers[0]
        if len(self.layers) > 1 or not isinstance(first, LeanRows) or not self.rotary.fixed:
            return None
        ends = ends_of(self.embed, head)
        return None if ends is None else LeanStep(first, ends, self.rotary)

    def _layer(self, session: Session, name: str, module: Any) -> Layer:
        if not is_lean(module):
            return LibraryLayer(module)
        lean = LeanLayer(module, self._joined(session, name, module, "self_attn"), self._joined(session, name, module, "mlp"))
        return HookedLayer(module, lean) if is_hooked(module) else lean

    def _joined(self, session: Session, name: str, module: Any, block: str) -> nn.Module:
        """The linear maps that share an input, as one; stand-ins are noted where they could be fused."""
        parts = [getattr(getattr(module, block), child) for child in FUSED[block]]
        fused: Fused | None = None if any(map(is_hooked, parts)) else session.once((Fused, *parts), lambda: fuse(parts))
        if fused is None:
            return SideBySide(parts)
        names = (f"{name}.{block}.{child}" for child in FUSED[block])
        self.swaps.update(zip(names, fused.stand_ins(), strict=True))
        return fused.whole

    def step(self, ids: Tensor, forward: Forward) -> Tensor:
        """Logits [B, T, V] of the next tokens ids [B, T]; replaces the library's forward in the decode path."""
        logits = None if self.whole is None else self.whole(ids, forward)
        if logits is not None:
            return logits
        hidden = self.embed(ids)
        rotary = self.rotary.at(forward.positions, forward.seen)
        for layer in self.layers:
            hidden = layer(hidden, rotary, forward)
        logits = None if self.native_head is None else self.native_head(hidden)
        return self.head(self.norm(hidden)) if logits is None else logits


def native_where_possible(layers: Sequence[Layer]) -> list[Layer]:
    """Layers of packed weights that follow each other as one; all others as they are."""
    found: list[Layer] = []
    shapes = [shape_of(layer) if type(layer) is LeanLayer else None for layer in layers]
    for native, some in groupby(zip(layers, shapes, strict=True), lambda pair: pair[1] is not None):
        pairs: list[Any] = list(some)
        found += [LeanRows([layer for layer, _ in pairs], [shape for _, shape in pairs])] if native else [x for x, _ in pairs]
    return found


def direct(module: nn.Module) -> Linear:
    """A linear map as a bare function; only what is hooked is called as a module."""
    if is_hooked(module):
        return module
    if type(module) in (nn.Linear, DenseLinear):
        weight, bias = module.weight, module.bias
        return onednn.linear(weight, bias) or partial(F.linear, weight=weight, bias=bias)  # type: ignore[arg-type]
    return module.forward


class SideBySide(nn.Module):
    """Several maps of one input that cannot be one: called in turn, the outputs concatenated."""

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__()
        self.parts = list(parts)  # not registered: they have their places in the model

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N1 + N2 + ...]."""
        return torch.cat([p(x) for p in self.parts], -1)
