"""Ragged caches: what a policy leaves per layer and head attends like an explicit mask over the full cache.

The reference runs the library's own modules on the library's own cache, which never loses an entry; an
attention function of this file hides from each head what was evicted there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from tests import tiny
from tests.methods.driving import make_session, prefill, prompt
from tests.sampling import sampled
from workers.families.llm import State
from workers.mechanisms import attention
from workers.mechanisms.cache import PADDING
from workers.mechanisms.quantized_cache import QuantizedStore
from workers.session import Session

EXPLICIT = "explicit-mask-of-the-tests"
allowed: list[Tensor] = []  # per layer [B, Hq, T, S]


def explicit_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed[module.layer_idx], float("-inf"))
    return (logits.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register(EXPLICIT, explicit_attention)
AttentionMaskInterface.register(EXPLICIT, lambda *args, **kwargs: None)


@contextmanager
def implementation(model: Any, name: str) -> Iterator[None]:
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(attention.NAME)


class Reference:
    """The library on a full cache, and which entries each head may still see."""

    def __init__(self, session: Session, prompts: list[list[int]], window: int | None):
        self.model, self.window = session.model, window
        longest = max(map(len, prompts))
        self.positions = torch.tensor([[PADDING] * (longest - len(p)) + list(range(len(p))) for p in prompts])
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        self.cache = DynamicCache()
        with implementation(self.model, "eager"), torch.inference_mode():
            self.model(
                input_ids=ids,
                attention_mask=(self.positions != PADDING).long(),
                position_ids=self.positions.clamp_min(0),
                past_key_values=self.cache,
            )
        kv_heads = session.info.kv_heads
        self.groups = session.info.heads // kv_heads
        self.alive = [torch.ones(len(prompts), kv_heads, longest, dtype=torch.bool) for _ in range(session.info.layers)]

    def keep(self, layer: int, index: list[Tensor]) -> None:
        """``index``: one tensor [B, n] a head, counted among what that head still holds."""
        for head, kept in enumerate(index):
            for row in range(kept.shape[0]):
                held = self.alive[layer][row, head].nonzero()[:, 0]
                now = torch.zeros_like(self.alive[layer][row, head])
                now[held[kept[row]]] = True
                self.alive[layer][row, head] = now

    def step(self, ids: Tensor) -> Tensor:
        t = ids.shape[1]
        new = self.positions.amax(1, keepdim=True) + 1 + torch.arange(t)
        self.positions = torch.cat((self.positions, new), 1)
        entry, row = self.positions[:, None, None, :], new[:, None, :, None]
        visible = (entry <= row) & (entry != PADDING)
        if self.window is not None:
            visible = visible & (entry > row - self.window)
        allowed.clear()
        for layer, alive in enumerate(self.alive):
            alive = torch.cat((alive, torch.ones(*alive.shape[:2], t, dtype=torch.bool)), 2)
            self.alive[layer] = alive
            allowed.append((visible & alive[:, :, None]).repeat_interleave(self.groups, 1))
        with implementation(self.model, EXPLICIT), torch.inference_mode():
            return self.model(input_ids=ids, position_ids=new, past_key_values=self.cache).logits


def some(generator: torch.Generator, rows: int, stored: int, kept: int) -> Tensor:
    """Random entries [B, kept], ascending, the newest always among them."""
    draws = [torch.randperm(stored - 1, generator=generator)[: kept - 1].sort().values for _ in range(rows)]
    return torch.cat((torch.stack(draws), torch.full((rows, 1), stored - 1)), 1)


def evict(state: State, reference: Reference, seed: int) -> None:
    """Other entries and other numbers of entries in every layer and head, rows alike in number."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(state.lengths)
    for number, layer in enumerate(state.cache.layers):
        stored = [g.store.length for g in layer.groups for _ in range(g.stop - g.start)]
        index = [some(generator, rows, s, s - 3 - 4 * number - 5 * h) for h, s in enumerate(stored)]
        layer.keep([kept + max(stored) - s for kept, s in zip(index, stored, strict=True)])  # places in the rectangle
        reference.keep(number, index)


def same_bytes_as_length(state: State) -> bool:
    """Evicted floats are really gone."""
    return all(
        g.store.nbytes() == 2 * len(state.lengths) * (g.stop - g.start) * g.store.length * 16 * 4
        for layer in state.cache.layers
        for g in layer.groups
    )


MODELS = {"llama": (tiny.llama_folder, None), "mistral": (tiny.mistral_folder, 16), "qwen3": (tiny.qwen3_folder, None)}
SETTINGS = [
    (name, lengths, chunk, store, kernel)
    for name in MODELS
    for lengths in ((50,), (50, 31))
    for chunk in (None, 7)
    for store in ("float", "quantized")
    for kernel in ("sdpa", "eager")
]


@pytest.mark.parametrize(("name", "lengths", "chunk", "store", "kernel"), sampled(SETTINGS, 3))
def test_ragged_cache_equals_an_explicit_mask(
    name: str, lengths: tuple[int, ...], chunk: int | None, store: str, kernel: str
) -> None:
    folder, window = MODELS[name]
    session = make_session(folder(), chunk_size=chunk, attention=kernel)
    prompts = [prompt(n, seed=n) for n in lengths]
    state, reference = prefill(session, *prompts), Reference(session, prompts, window)
    if store == "quantized":
        for number, layer in enumerate(state.cache.layers):
            quantized = QuantizedStore(*layer.group.store.read(), bits=4, group_size=8, residual=8)
            layer.group.store = quantized
            reference.cache.layers[number].keys, reference.cache.layers[number].values = quantized.read()
    generator = torch.Generator().manual_seed(1)
    for turn, t in enumerate((3, 1, 4)):
        evict(state, reference, seed=turn)
        if store == "quantized":  # newly packed entries are rounded: show the reference what is stored now
            refresh(state, reference)
        else:
            assert same_bytes_as_length(state)
        ids = torch.randint(3, tiny.VOCAB, (len(lengths), t), generator=generator)
        with torch.inference_mode():
            ours = session.family.step(session, state, ids)
        torch.testing.assert_close(ours, reference.step(ids), rtol=1e-5, atol=2e-5)
        assert [g.store.length for layer in state.cache.layers for g in layer.groups] == [
            int(alive[0, head].sum()) for alive in reference.alive for head in range(alive.shape[1])
        ]


def refresh(state: State, reference: Reference) -> None:
    """Copy what our store holds to the places of the full cache that are still visible.

    Packing happens at an append; forcing it here, by an append of nothing, keeps both sides at the same numbers.
    """
    for number, layer in enumerate(state.cache.layers):
        full = reference.cache.layers[number]
        keys, values = full.keys.clone(), full.values.clone()
        for g in layer.groups:
            k, v = g.store.read()
            g.store.append(k[:, :, :0], v[:, :, :0])
            k, v = g.store.read()
            for place, head in enumerate(range(g.start, g.stop)):
                alive = reference.alive[number][:, head]
                keys[:, head][alive] = k[:, place].flatten(0, 1)
                values[:, head][alive] = v[:, place].flatten(0, 1)
        full.keys, full.values = keys, values


@pytest.mark.parametrize("chunk", [None, 7])
def test_prefill_caches_equal_the_librarys(chunk: int | None) -> None:
    session = make_session(chunk_size=chunk)
    ids = prompt(40)
    state, reference = prefill(session, ids), Reference(session, [ids], None)
    for ours, theirs in zip(state.cache.layers, reference.cache.layers, strict=True):
        keys, values = ours.group.store.read()
        torch.testing.assert_close(keys, theirs.keys, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(values, theirs.values, rtol=1e-5, atol=2e-5)


def test_crop_takes_back_exactly_what_came_last() -> None:
    session = make_session()
    ids = prompt(30)
    state = prefill(session, ids)
    with torch.inference_mode():
        expected = session.family.step(session, prefill(session, ids), torch.tensor([[9]]))
        session.family.step(session, state, torch.tensor([[5, 6, 7]]))
        state.cache.crop_newest(3)
        state.next_position -= 3
        again = session.family.step(session, state, torch.tensor([[9]]))
    assert state.cache.seen == 31
    assert state.cache.stored() == 31
    assert torch.equal(again, expected)
