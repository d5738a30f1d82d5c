"""The one attention function, registered with the library and called by the lean blocks alike.

It appends the new keys and values to the cache, builds the mask of this very layer and head
group, computes, and lets observers look at queries and keys. Because masks are built here, layers
and heads may differ in length also for forwards of several tokens.

Shapes: B batch, Hq query heads, H key-value heads, G = Hq / H, T new tokens, S stored entries, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from workers.mechanisms.cache import PADDING, KVLayer, StudioCache
from workers.mechanisms.held import Held
from workers.mechanisms.vision_attention import active_vision

NAME = "pareto"


@dataclass
class Forward:
    """One forward pass of the model: what attention must know beyond its own tensors.

    Attributes:
        cache: where keys and values go.
        phase: ``prefill`` or ``decode`` (scoring uses the decode path).
        positions: [B, T] logical positions of the new tokens, -1 for padding.
        padded: some rows are padded.
        ends_prefill: this is the last chunk of the prompt; evictors act now.
        prompt_lengths: prompt tokens of each row, padding not counted; budgets are shares of these.
        kernel: ``sdpa`` or ``eager``.
        observers: called after every attention.
        reading: called before every attention: what it reads in the place of everything stored; None = everything.
        attending: called before every attention: what comes out of it [B, Hq, T, D], or None = compute it as usual.
        retain_queries: newest queries to remember across prefill chunks, per layer.
        retain_on: remember them across decode steps too.
        narrowed: set by token policies: from which layer on only some new tokens travel, as
            (first layer, index [B, n] into the new tokens).
        image_tokens: [B, T] which of the new tokens come from an image; None = none of them.
        ids: [B, T] of the new tokens.
        before: logits [B, V] that foretold the first of them; None at the start of the prompt.
        logits: of a decode step, once it is done: [B, T, V]; at the prompt's end those behind it: [B, 1, V].
    """

    cache: StudioCache
    phase: Literal["prefill", "decode"]
    positions: Tensor
    padded: bool = False
    ends_prefill: bool = False
    prompt_lengths: Sequence[int] = ()
    kernel: Literal["sdpa", "eager"] = "sdpa"
    observers: list[Callable[[AttentionCall], None]] = field(default_factory=list)
    reading: Callable[[AttentionCall], Held | None] | None = None
    attending: Callable[[AttentionCall], Tensor | None] | None = None
    retain_queries: int = 0
    retain_on: bool = False
    narrowed: list[tuple[int, Tensor]] = field(default_factory=list)
    image_tokens: Tensor | None = None
    ids: Tensor | None = None
    before: Tensor | None = None
    logits: Tensor | None = None
    seen: int = 0
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        """Length of the longest prompt, which the others are padded to."""
        return max(self.prompt_lengths, default=0)

    def positions_at(self, layer: int) -> Tensor:
        """Positions [B, T'] of the tokens that travel through this layer."""
        return self._travelling(self.positions, layer)

    def image_tokens_at(self, layer: int) -> Tensor | None:
        """Which of the tokens that travel through this layer come from an image [B, T']; None = none of them."""
        return None if self.image_tokens is None else self._travelling(self.image_tokens, layer)

    def _travelling(self, x: Tensor, layer: int) -> Tensor:
        for first, index in self.narrowed:
            if layer >= first:
                x = x.gather(1, index)
        return x


@dataclass
class AttentionCall:
    """What an observer sees after the attention of one layer.

    Attributes:
        query: [B, Hq, T, D] after rotary embedding.
        cache: the layer's memory, the new entries included.
        softcap: tanh cap of the logits; None = there is none.
    """

    layer: int
    query: Tensor
    cache: KVLayer
    forward: Forward
    scaling: float
    window: int | None = None
    softcap: float | None = None

    @property
    def held(self) -> Held:
        """What the layer holds now, as one rectangle."""
        return self.cache.held()

    @property
    def keys(self) -> Tensor:
        """All stored keys [B, H, S, D]."""
        return self.held.keys

    @property
    def values(self) -> Tensor:
        """All stored values [B, H, S, D]."""
        return self.held.values

    def newest_queries(self, count: int) -> Tensor:
        """The newest ``count`` queries [B, Hq, <= count, D], earlier prefill chunks included."""
        tail = self.cache.query_tail
        query = self.query if tail is None else torch.cat((tail[0], self.query), 2)
        return query[:, :, -count:]

    def newest_positions(self, count: int) -> Tensor:
        """Logical positions [B, <= count] of :meth:`newest_queries`."""
        tail, positions = self.cache.query_tail, self.forward.positions_at(self.layer)
        return (positions if tail is None else torch.cat((tail[1], positions), 1))[:, -count:]

    def probabilities(self, query: Tensor, first: int | None = None) -> Tensor:
        """Softmax attention [B, Hq, w, S] (float32) of some queries over all stored keys.

        Args:
            query: [B, Hq, w, D]; the newest ones (earlier prefill chunks included), or
            first: those that start at this place among the new tokens.
        """
        b, hq, w, d = query.shape
        held = self.held
        keys = held.keys
        h, s = keys.shape[1], keys.shape[2]
        t = self.query.shape[2]
        behind = 0 if first is None else t - first - w  # entries newer than the last of these queries
        logits = (query.reshape(b, h, hq // h * w, d).float() @ keys.float().transpose(2, 3)) * self.scaling
        logits = capped(logits, self.softcap).view(b, h, hq // h, w, s)
        positions = self.newest_positions(w) if first is None else self.forward.positions_at(self.layer)[:, first : first + w]
        mask = visible(held, positions, w, self.window, s, query.device, behind)
        return logits.masked_fill(~mask[:, :, None], float("-inf")).softmax(-1).reshape(b, hq, w, s)


@dataclass(frozen=True)
class InPrompts:
    """An observer of prompts alone: decode steps are not shown to it, and need not make a call to show."""

    observe: Callable[[AttentionCall], None]

    def __call__(self, call: AttentionCall) -> None:
        self.observe(call)


def of_steps(observers: Sequence[Callable[[AttentionCall], None]]) -> list[Callable[[AttentionCall], None]]:
    """Those that want to see decode steps."""
    return [o for o in observers if not isinstance(o, InPrompts)]


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits of the attention where the model lets none go far beyond ``softcap`` (Gemma 2); None = as they are."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def visible(held: Held, positions: Tensor, t: int, window: int | None, s: int, device: torch.device, behind: int = 0) -> Tensor:
    """Which stored entries each of ``t`` queries may see: bool [B or 1, H or 1, t, S].

    The queries are those of the newest entries, or of the ones ``behind`` entries before them. A
    padded query sees only itself, so that no softmax is empty.
    """
    if held.positions is None:
        rows = torch.arange(s - t - behind, s - behind, device=device)[:, None]
        columns = torch.arange(s, device=device)[None, :]
        mask = columns <= rows
        if window is not None:
            mask &= columns > rows - window
        return mask[None, None]
    entry = held.positions[:, :, None, :]  # [B, 1 or H, 1, S]
    row = positions[:, None, :, None]  # [B, 1, t, 1]
    mask = (entry <= row) & (entry != PADDING)
    if window is not None:
        mask &= entry > row - window
    own = torch.arange(s - t - behind, s - behind, device=device)[:, None] == torch.arange(s, device=device)[None, :]
    return mask | own


def attend(
    forward: Forward,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Append, attend, let observers look.

    Args:
        query: [B, Hq, T, D]; key, value: [B, H, T, D], after rotary embedding.
        window: sliding window of the layer, in positions.
        softcap: tanh cap of the logits (Gemma 2).

    Returns:
        [B, T, Hq, D]
    """
    memory = forward.cache.layers[layer]
    positions = forward.positions_at(layer) if forward.narrowed else forward.positions
    memory.append(key, value, positions, forward.seen, forward.padded)
    per_kv = query.shape[1] // key.shape[1]
    watched = forward.attending or forward.reading or forward.observers
    call = AttentionCall(layer, query, memory, forward, scaling, window, softcap) if watched else None
    out = forward.attending(call) if call and forward.attending else None
    held = forward.reading(call) if call and forward.reading else None
    if out is None and (held is not None or len(memory.groups) == 1):
        out = _attention(forward, held or memory.groups[0].held(), positions, query, scaling, window, softcap)
    elif out is None:
        parts = [
            _attention(forward, g.held(), positions, query[:, g.start * per_kv : g.stop * per_kv], scaling, window, softcap)
            for g in memory.groups
        ]
        out = torch.cat(parts, 1)
    if call:
        for observe in forward.observers:
            observe(call)
    if forward.retain_queries and (forward.phase == "prefill" or forward.retain_on):
        keep, tail, places = forward.retain_queries, query, positions
        if memory.query_tail is not None:
            tail, places = torch.cat((memory.query_tail[0], tail), 2), torch.cat((memory.query_tail[1], places), 1)
        over = forward.ends_prefill and not forward.retain_on
        memory.query_tail = None if over else (tail[:, :, -keep:].clone(), places[:, -keep:].clone())
    return out.transpose(1, 2)


def _attention(
    forward: Forward,
    held: Held,
    positions: Tensor,
    query: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention to what some heads hold: query [B, Hq, T, D] -> [B, Hq, T, D]."""
    keys, values = held.keys, held.values
    b, hq, t, d = query.shape
    h, s = keys.shape[1], keys.shape[2]
    gapless = held.positions is None
    if window is not None and gapless and s <= window:
        window = None
    unmasked = t == 1 and window is None and (gapless or not held.padded)
    causal = gapless and s == t > 1 and window is None
    # Grouped queries as the library calls them; for one token in bfloat16 packing is faster (`make bench`: kernels).
    grouped = causal or (unmasked and query.dtype == torch.float32 and query.device.type == "cpu")
    if forward.kernel == "sdpa" and softcap is None and grouped:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=causal, scale=scaling, enable_gqa=hq != h)
    packed = query.reshape(b, h, hq // h * t, d)  # the G query heads of a KV head as extra rows
    mask = None if unmasked else _mask(forward, held, positions, t, s, window, hq // h, query.device)
    if forward.kernel == "sdpa" and softcap is None:
        return F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scaling).view(b, hq, t, -1)
    logits = capped((packed @ keys.transpose(2, 3)) * scaling, softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ values).view(b, hq, t, -1)


def _mask(
    forward: Forward, held: Held, positions: Tensor, t: int, s: int, window: int | None, groups: int, device: torch.device
) -> Tensor:
    """Mask [B or 1, H or 1, G * T, S], built once a forward where layers share it."""
    key = (t, s, window, groups) if held.positions is None else None
    if key is not None and key in forward.masks:
        return forward.masks[key]
    mask = visible(held, positions, t, window, s, device).repeat(1, 1, groups, 1)
    if key is not None:
        forward.masks[key] = mask
    return mask


_active: ContextVar[Forward | None] = ContextVar("pareto_forward", default=None)


@contextmanager
def forwarding(forward: Forward) -> Iterator[None]:
    """Everything that the library's modules attend to inside belongs to this forward."""
    token = _active.set(forward)
    try:
        yield
    finally:
        _active.reset(token)


def active_forward() -> Forward | None:
    """The forward under way, for wrappers of library modules."""
    return _active.get()


def _library_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What the library calls. Without a forward of ours it is the library's own sdpa."""
    forward = _active.get()
    vision = active_vision()
    if vision is not None:
        return vision.attend(module, query, key, value, attention_mask, scaling, dropout=dropout, **kwargs)
    if forward is None:
        if sliding_window is not None:
            kwargs["sliding_window"] = sliding_window
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return attend(forward, module.layer_idx, query, key, value, scale, sliding_window, softcap), None  # type: ignore[arg-type]


def _library_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask inside a forward of ours (it is built per layer); the library's own otherwise."""
    return None if _active.get() is not None else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, _library_attention)
AttentionMaskInterface.register(NAME, _library_mask)
