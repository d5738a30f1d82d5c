"""ThinK against norms computed by numpy from the library's own queries and cache, and its store against zeroed floats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests import tiny
from tests.methods.calling import kept
from tests.methods.driving import attached, generate, library_model, make_session, prefill, prompt, tokens
from workers.mechanisms.cache import HeadGroup
from workers.mechanisms.kv_store import FloatStore, gather_entries
from workers.mechanisms.thin_keys import thin_store
from workers.policies.kv.h2o import H2O
from workers.policies.kv.snapkv import SnapKV
from workers.policies.kv.think import ThinK


def library_queries_and_cache(ids: list[int]) -> tuple[list[np.ndarray], list[tuple[Tensor, Tensor]]]:
    """Rotated queries [Hq, L, D], and keys and values [1, H, L, D], per layer."""
    model, cache, projected = library_model(tiny.llama_folder(), "eager"), DynamicCache(), []
    hooks = [x.self_attn.q_proj.register_forward_hook(lambda m, a, out: projected.append(out)) for x in model.model.layers]
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]), past_key_values=cache)
        cos, sin = model.model.rotary_emb(projected[0], torch.arange(len(ids))[None])
        heads = [q.view(1, len(ids), 4, 16).transpose(1, 2) for q in projected]
        queries = [apply_rotary_pos_emb(q, q, cos, sin)[0][0].numpy() for q in heads]
    for hook in hooks:
        hook.remove()
    return queries, [(x.keys, x.values) for x in cache.layers]


@pytest.mark.parametrize("chunk", [None, 7])
def test_channels_of_the_largest_norms_stay(chunk: int | None) -> None:
    """Frobenius norm of the product of a channel's queries and keys, by SVD of that very matrix."""
    ids, window = prompt(40), 6
    session = make_session(chunk_size=chunk)
    with ThinK(keep_channels=0.5, window=window).attach(session):
        state = prefill(session, ids)
    for layer, queries, (keys, values) in zip(state.cache.layers, *library_queries_and_cache(ids), strict=True):
        expected = keys.clone()
        for head in range(2):
            newest = queries[2 * head : 2 * head + 2, -window:].astype(np.float64).reshape(-1, 16)  # of both query heads
            products = [np.outer(newest[:, d], keys[0, head, :, d].numpy()) for d in range(16)]
            worst = np.argsort([np.linalg.norm(p, "fro") for p in products])[:8]
            expected[0, head, :-window, worst] = 0
        got_keys, got_values = layer.group.store.read()
        torch.testing.assert_close(got_keys, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got_values, values, rtol=1e-5, atol=1e-5)
    assert session.acted["think"] == 2 * 34


def test_three_keys_by_hand() -> None:
    """Squared norms of the query channels 1, 4, 0, 9 and of the key channels 9, 1, 100, 4; the padding would add 1,000."""
    keys = torch.tensor([[[[1000.0, 1000, 1000, 1000], [2, 1, 10, 0], [2, 0, 0, 2], [1, 0, 0, 0]]]])
    store = FloatStore()
    store.append(keys, keys)
    group = HeadGroup(0, 1, store, positions=torch.tensor([[[-1, 0, 1, 2]]]), padded=True)
    ThinK(keep_channels=0.5, window=1).prune(group, torch.tensor([[[1.0, 4, 0, 9]]]))  # worth 9, 4, 0, 36
    assert group.store.read()[0][0, 0, 1:].tolist() == [[2, 0, 0, 0], [2, 0, 0, 2], [1, 0, 0, 0]]
    assert torch.equal(group.store.read()[1], keys)
    assert group.store.nbytes() == (3 * 2 + 4) * 4 + 4 * 4 * 4 + 2 * 2  # old keys, the newest one, values, two channels


def test_the_store_is_floats_with_zeros() -> None:
    """Heads lose different numbers of old entries, several times, with growth and taking back between."""
    g = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 3, 200, 8, generator=g)
    channels = torch.rand(2, 3, 8, generator=g).topk(5, dim=-1).indices.sort(-1).values
    store = thin_store(keys[:, :, :60], values[:, :, :60], channels, window=10)
    dropped = torch.ones(2, 3, 60, 8, dtype=torch.bool)
    dropped.scatter_(3, channels[:, :, None].expand(-1, -1, 60, -1), False)[:, :, 50:] = False
    plain, seen = [keys[:, :, :60].masked_fill(dropped, 0), values[:, :, :60]], 60
    for _ in range(4):
        index = torch.rand(2, 3, store.length, generator=g).topk(store.length * 2 // 3, dim=-1).indices.sort(-1).values
        spare, before = store.clone(), plain
        store.keep(index)
        plain = [gather_entries(x, index) for x in plain]
        more = [x[:, :, seen : seen + 9] for x in (keys, values)]
        store.append(*more)
        store.crop(2)
        plain, seen = [torch.cat((x, m[:, :, :-2]), 2) for x, m in zip(plain, more, strict=True)], seen + 7
        for a, b, c, d, e in zip(store.read(), plain, spare.read(), before, store.heads(1, 2).read(), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(c, d)
            assert torch.equal(e, b[:, 1:2])
    assert store._packed is not None  # heads differ in how many old entries they hold


@pytest.mark.parametrize("heads", ["uniform", "adaptive"])
def test_after_an_evictor_and_while_it_goes_on(heads: str) -> None:
    """The evictor keeps what it keeps alone; bytes are those of the entries that are left."""
    session, ids = make_session(), prompt(80)
    evictor = SnapKV(keep=0.5, window=8, heads=heads)
    with attached(session, evictor):
        alone = prefill(session, ids)
    with attached(session, evictor, ThinK(window=8)):
        thin = prefill(session, ids)
    assert all(np.array_equal(a, b) for a, b in zip(kept(alone), kept(thin), strict=True))
    for group in (g for layer in thin.cache.layers for g in layer.groups):
        old = max(0, group.store.length - 8)
        of_a_head = old * 10 * 4 + 8 * 16 * 4 + group.store.length * 16 * 4 + (10 * 2 if old else 0)
        assert group.store.nbytes() == (group.stop - group.start) * of_a_head
    with attached(session, H2O(keep=0.5, every=3, heads=heads), ThinK(window=8)):
        trace = generate(session, [ids], new=12)
    assert trace.counts["cached_tokens"] <= 43
    assert trace.counts["kv_bytes"] < trace.counts["cached_tokens"] * 2 * 2 * 2 * 16 * 4


def test_each_row_says_what_it_says_alone() -> None:
    session, prompts = make_session(), (prompt(40), prompt(23, seed=1), prompt(6, seed=2))
    with ThinK(keep_channels=0.3, window=8).attach(session):
        together = tokens(generate(session, prompts))
        alone = [tokens(generate(session, [p]))[0] for p in prompts]
    assert together == alone
    assert together != tokens(generate(session, prompts))
