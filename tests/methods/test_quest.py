"""Quest against the library's own modules on a full cache, with an attention of this file that hides the other pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from tests import tiny
from tests.methods.driving import attached, forced, generate, make_session, prefill, prompt, tokens
from workers.mechanisms import attention
from workers.mechanisms.held import Held
from workers.mechanisms.pages import Pages
from workers.policies.decode.prompt_lookup import PromptLookup
from workers.policies.kv.h2o import H2O
from workers.policies.kv.quest import Quest
from workers.policies.runtime.lean_decode import LeanDecode

PAGED = "paged-attention-of-the-tests"
SIZE, KEEP = 8, 0.4


def pages_read(queries: np.ndarray, keys: np.ndarray, window: int | None) -> list[int]:
    """One KV head: queries [any, D] of the newest T positions times its query heads, keys [S, D]; by loops."""
    t, s = len(queries) // 2, len(keys)
    pages = [range(start, min(start + SIZE, s)) for start in range(0, s, SIZE)]
    seen = [i for i, page in enumerate(pages) if window is None or page[-1] > s - t - window]
    own = [i for i in seen if pages[i][-1] >= s - t]
    bounds = {}
    for i in seen:
        low, high = keys[pages[i]].min(0), keys[pages[i]].max(0)
        bounds[i] = max(sum(max(q * a, q * b) for q, a, b in zip(query, low, high, strict=True)) for query in queries)
    others = sorted((i for i in seen if i not in own), key=lambda i: -bounds[i])
    return own + others[: max(1, round(KEEP * len(seen))) - 1]


def paged_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    t, s = query.shape[2], key.shape[2]
    window = getattr(module.config, "sliding_window", None)
    row, column = torch.arange(s - t, s)[:, None], torch.arange(s)
    allowed = ((column <= row) & (column > row - (window or s))).repeat(4, 1, 1)  # [Hq, T, S]
    if module.layer_idx == 1 and s > t:  # a decode step
        for head in range(2):
            queries = query[0, 2 * head : 2 * head + 2].reshape(-1, 16).double().numpy()
            chosen = pages_read(queries, key[0, head].double().numpy(), window)
            allowed[2 * head : 2 * head + 2] &= torch.isin(column // SIZE, torch.tensor(chosen))
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    logits = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed, float("-inf"))
    return (logits.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register(PAGED, paged_attention)
AttentionMaskInterface.register(PAGED, lambda *args, **kwargs: None)


@contextmanager
def paged(model: Any) -> Iterator[None]:
    model.set_attn_implementation(PAGED)
    try:
        yield
    finally:
        model.set_attn_implementation(attention.NAME)


@pytest.mark.parametrize("kind", ["llama", "mistral"])  # Mistral sees 16 positions
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1), (5, 1, 12)], ids=str)
def test_logits_are_those_of_an_explicit_mask(kind: str, chunks: tuple[int, ...]) -> None:
    folder = tiny.llama_folder() if kind == "llama" else tiny.mistral_folder()
    session, ids, new, cache = make_session(folder), prompt(61), torch.tensor([prompt(20, seed=1)]), DynamicCache()
    with attached(session, Quest(keep=KEEP, page_size=SIZE)), torch.inference_mode():
        state, start = prefill(session, ids), 0
        with paged(session.model):
            session.model(input_ids=torch.tensor([ids]), past_key_values=cache)
        for t in chunks:
            ours = session.family.step(session, state, new[:, start : start + t])
            with paged(session.model):
                expected = session.model(input_ids=new[:, start : start + t], past_key_values=cache).logits
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
            start += t
    assert session.acted["quest"] > 0


def test_bounds_by_hand() -> None:
    """Pages (1, -2), (3, 0) and (-1, 5): for the query (2, -1) at most 2 * 3 - -2 and 2 * -1 - 5."""
    keys = torch.tensor([[[[9.0, 9], [1, -2], [3, 0], [-1, 5]]]])
    pages = Pages.of(Held(keys, keys, torch.tensor([[[-1, 0, 1, 2]]]), padded=True), size=2)  # the first is padding
    assert pages.low.tolist() == [[[[1, -2], [-1, 5]]]]
    assert pages.high.tolist() == [[[[3, 0], [-1, 5]]]]
    query = torch.tensor([[[[2.0, -1]]]])
    assert pages.bounds(query).tolist() == [[[8, -7]]]
    assert pages.bounds(torch.cat((query, -query), 1)).tolist() == [[[8, 7]]]  # the larger of two query heads
    assert pages.best(query, 0.5).tolist() == [[[False, True]]]  # the newest page always
    assert pages.best(query, 1.0) is None
    assert pages.index(torch.tensor([[[True, True]]]), 4).tolist() == [[[1, 2, 3]]]
    more = pages.joined(torch.tensor([[[[0.0, 6], [4, 4]]]]))
    assert more.low.tolist() == [[[[1, -2], [-1, 5], [4, 4]]]]
    assert more.high.tolist() == [[[[3, 0], [0, 6], [4, 4]]]]


def test_bounds_follow_appends_evictions_and_drafts_taken_back() -> None:
    session = make_session()
    with attached(session, H2O(keep=0.6, every=3, heads="adaptive"), Quest(page_size=4, skip_layers=0)), torch.inference_mode():
        state, lengths = prefill(session, prompt(50), prompt(33, seed=1)), set()
        for token in range(8):
            session.family.step(session, state, torch.full((2, 1 + token % 2), 5 + token))
            if token == 6:
                state.cache.crop_newest(1)
                state.next_position = state.next_position - 1
            for group in (g for layer in state.cache.layers for g in layer.groups):
                lengths.add(group.store.length)
                anew = Pages.of(group.held(), 4)
                for name in ("low", "high", "entries"):
                    assert torch.equal(getattr(group.pages, name), getattr(anew, name))
        states = (state, replace(state, cache=state.cache.clone()))
        outs = [session.family.step(session, s, torch.full((2, 1), 7)) for s in states]
    assert len(lengths) > 4
    assert torch.equal(*outs)


def test_what_is_counted() -> None:
    """A prompt of 60 positions and 3 steps: of 61, 62, 63 positions in 8 pages the second layer reads 3, the newest of 5, 6, 7."""
    session = make_session()
    base = generate(session, [prompt(60)], new=4).counts
    with attached(session, Quest(keep=KEEP, page_size=SIZE)):
        counts = generate(session, [prompt(60)], new=4).counts
    unread = [n - (2 * 8 + newest) for n, newest in ((61, 5), (62, 6), (63, 7))]
    assert counts["unread_kv_share"] == pytest.approx(sum(unread) / (2 * (61 + 62 + 63)))
    assert counts["kv_bytes"] - base["kv_bytes"] == 2 * 2 * 8 * 16 * 4  # low and high, heads, pages
    assert "unread_kv_share" not in base


def test_rows_alone_lean_decode_and_drafts() -> None:
    session, prompts = make_session(), (prompt(60), prompt(43, seed=1), prompt(12, seed=2))
    quest = Quest(keep=0.3, page_size=4)
    with attached(session, quest):
        together = tokens(generate(session, prompts))
        alone = [tokens(generate(session, [p]))[0] for p in prompts]
        scores = forced(session, prompts[0], prompt(40, seed=3))
    with attached(session, quest, LeanDecode()):
        assert tokens(generate(session, prompts)) == together
        torch.testing.assert_close(forced(session, prompts[0], prompt(40, seed=3)), scores, rtol=1e-4, atol=1e-4)
    assert together == alone
    assert together != tokens(generate(session, prompts))
    with attached(session, quest, PromptLookup()):
        trace = generate(session, [prompt(16) * 4])
    assert trace.counts["drafted_tokens"] > 0
    assert 0 < trace.counts["unread_kv_share"] < 0.5
