"""CaM against attention maps and caches of the library's eager implementation, merged by numpy one entry after the other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from studio_state.pipeline import parse_pipeline
from studio_state.problems import pipeline_problems
from tests import tiny
from tests.methods.driving import attached, generate, library_model, make_session, prefill, prompt, tokens
from workers.families.batches import State
from workers.mechanisms.draws import position_draws
from workers.mechanisms.held import Held
from workers.mechanisms.merging import Following, Parting
from workers.methods import Policy, catalogue
from workers.policies.kv.cam import CaM
from workers.policies.kv.h2o import H2O
from workers.policies.kv.streamingllm import StreamingLLM

IDS = prompt(40)
KV_HEADS = 2


def after_prefill(policy: Policy, *prompts: list[int], **spec: int) -> State:
    session = make_session(**spec)
    with attached(session, policy):
        return prefill(session, *(prompts or (IDS,)))


def library() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per layer: attention of a KV head [H, L, L], mean over its query heads; keys and values [H, L, D]."""
    cache = DynamicCache()
    with torch.inference_mode():
        maps = library_model(tiny.llama_folder(), "eager")(
            input_ids=torch.tensor([IDS]), past_key_values=cache, output_attentions=True
        ).attentions
    for m, layer in zip(maps, cache.layers, strict=True):
        grouped = m[0].double().numpy().reshape(KV_HEADS, -1, *m.shape[2:]).mean(1)
        yield grouped, layer.keys[0].double().numpy(), layer.values[0].double().numpy()


def merged(maps: np.ndarray, values: np.ndarray, kept: list[int], draws: list[float], window: int, budget: int) -> np.ndarray:
    """Values of one head's kept entries [n, D]: every other one, if drawn, in equal parts on the next ``budget`` kept ones."""
    length = len(values)
    newest = range(length - window, length)
    attention = [np.mean([maps[q, j] for q in newest if q >= j]) for j in range(length)]
    out = {c: values[c].copy() for c in kept}
    for e in set(range(length)) - set(kept):
        following = [c for c in kept if c > e][:budget]
        if following and draws[e] < min(1.0, attention[e] / np.mean([attention[c] for c in following])):
            for c in following:
                out[c] += values[e] / len(following)
    return np.array([out[c] for c in kept])


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("choice", ["recency", "attention"])
def test_values_equal_the_papers_and_keys_stay(choice: str, chunk: int | None) -> None:
    policy = CaM(keep=0.4, choice=choice, sinks=2, window=9, merge_budget=5, merge_prompt=True)
    state = after_prefill(policy, **({"chunk_size": chunk} if chunk else {}))
    other = after_prefill(StreamingLLM(keep=0.4, sinks=2) if choice == "recency" else H2O(keep=0.4))
    moved = 0
    for number, (maps, keys, values) in enumerate(library()):
        layer, plain = (x.cache.layers[number] for x in (state, other))
        draws = position_draws(torch.arange(40).expand(1, KV_HEADS, -1), seed=0, layer=number)[0].tolist()
        for head in range(KV_HEADS):
            kept = layer.held().places()[0, head].tolist()
            assert kept == plain.held().places()[0, head].tolist()
            wanted = merged(maps[head], values[head], kept, draws[head], window=9, budget=5)
            np.testing.assert_allclose(layer.held().values[0, head].numpy(), wanted, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(layer.held().keys[0, head].numpy(), keys[head][kept], rtol=1e-4, atol=1e-5)
            moved += int((np.abs(wanted - values[head][kept]).max(1) > 1e-3).sum())
    assert moved >= 2 * KV_HEADS * 5


def test_while_answering_what_leaves_is_merged_and_not_before() -> None:
    """Of three positions that leave at once, some are added, in equal parts, to all that follow; the sinks get nothing."""
    states = []
    for policy in (StreamingLLM(keep=0.5, every=3), CaM(keep=0.5, every=3, merge_budget=512)):
        session = make_session()
        with attached(session, policy), torch.inference_mode():
            state = prefill(session, IDS)
            before = [layer.held() for layer in state.cache.layers]
            leaving = [h.values[0, :, 4:7].clone() for h in before]
            states.append((state, [h.values.clone() for h in before]))
            for token in (5, 6, 7):
                session.family.step(session, state, torch.tensor([[token]]))
    (plain, dropped), (state, kept) = states
    assert all(torch.equal(a, b) for a, b in zip(dropped, kept, strict=True))
    choices = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)  # which of the three were drawn: [8, 3]
    drawn = []
    for a, b, gone in zip(plain.cache.layers, state.cache.layers, leaving, strict=True):
        assert torch.equal(a.held().places(), b.held().places())
        assert torch.equal(a.held().keys, b.held().keys)
        change = (b.held().values - a.held().values)[0]  # [H, 20, D]
        assert not change[:, :4].any()
        for head in range(KV_HEADS):
            fits = (choices @ gone[head] / 16 - change[head, 4]).abs().amax(1) < 1e-5
            assert int(fits.sum()) == 1
            torch.testing.assert_close(change[head, 4:], change[head, 4].expand(16, -1), rtol=1e-4, atol=1e-5)
            drawn.append(int(choices[fits].sum()))
    assert sum(drawn) > 0


def test_a_seed_names_the_draws() -> None:
    def values(seed: int) -> list[torch.Tensor]:
        return [layer.held().values for layer in after_prefill(CaM(keep=0.4, merge_prompt=True), seed=seed).cache.layers]

    assert all(torch.equal(a, b) for a, b in zip(values(1), values(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(values(1), values(2), strict=True))


def test_what_is_added_is_on_average_what_attention_loses() -> None:
    """One query, one evicted position: over many seeds the merged output is that of the full cache but for the norm."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 1, 6, 4, generator=generator, dtype=torch.float64)
    attention = torch.tensor([[[0.1, 0.2, 0.25, 0.15, 0.2, 0.1]]], dtype=torch.float64)
    held = Held(values, values)
    following = Following.of(Parting.of(held, torch.tensor([[[1, 2, 3, 4, 5]]])), 3)
    ratio = following.ratio(attention)
    assert float(ratio) == pytest.approx(0.1 / 0.2)
    draws = torch.stack([position_draws(torch.zeros(1, 1, 1, dtype=torch.long), seed, 0) for seed in range(4000)])
    share = float((draws < ratio).double().mean())
    added = following.spread(values, torch.ones(1, 1, 1, dtype=torch.bool)) - values[:, :, 1:]
    gained = share * torch.einsum("bhs,bhsd->bhd", attention[:, :, 1:], added)
    torch.testing.assert_close(gained, attention[:, :, :1] * values[:, :, 0], rtol=0.1, atol=1e-6)


def test_the_cache_stays_bounded_and_rows_of_a_batch_answer_as_alone() -> None:
    session = make_session()
    with attached(session, CaM(keep=0.5, every=3, window=16, choice="attention", heads="adaptive")):
        assert generate(session, [IDS], new=10).counts["cached_tokens"] <= 20 + 3
    with attached(session, CaM(keep=0.5, every=3, window=16)):
        together = generate(session, [IDS, IDS[:21]], new=12)
        alone = [generate(session, [ids], new=12) for ids in (IDS, IDS[:21])]
    assert tokens(together) == [tokens(trace)[0] for trace in alone]


def test_a_cache_that_is_packed_while_it_merges_is_refused() -> None:
    def said(text: str) -> list[str]:
        return [p.message for p in pipeline_problems(parse_pipeline(text), catalogue())]

    assert "kv.dtype" in said("cam+kivi")[0]
    assert said("cam:when=prefill+kivi") == []
