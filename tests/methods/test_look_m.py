"""LOOK-M against attention maps and caches of the library's eager implementation, chosen and merged by numpy."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from studio_state.pipeline import parse_pipeline
from studio_state.problems import pipeline_problems
from tests import tiny_vision
from tests.methods.driving import attached, generate, image_item, make_session, prefill, prompt, run_items, seeing_session, tokens
from tests.methods.seeing import given, one, prefilled
from workers.families.batches import State
from workers.methods import catalogue
from workers.policies.kv.h2o import H2O
from workers.policies.kv.look_m import IMAGE, LookM
from workers.policies.tokens.fastv import FastV
from workers.session import Session
from workers.workloads.base import Item

FOLDER = tiny_vision.llava_folder()
KV_HEADS = 2


def session(**spec: int) -> Session:
    return seeing_session(FOLDER, **spec)


@cache
def truth() -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Of the item ``one()``: which positions are of the image [L]; per layer column sums [H, L], keys and values [H, L, D]."""
    what, held = given(FOLDER, one(), "eager"), DynamicCache()
    with torch.inference_mode():
        maps = what.model(
            inputs_embeds=what.embeds[None], position_ids=what.positions[None], past_key_values=held, output_attentions=True
        ).attentions
    sums = [m[0].double().numpy().sum(1).reshape(KV_HEADS, -1, m.shape[-1]).mean(1) for m in maps]
    keys, values = ([getattr(layer, name)[0].double().numpy() for layer in held.layers] for name in ("keys", "values"))
    return (what.ids == what.model.config.image_token_id).numpy(), sums, keys, values


def choice(sums: np.ndarray, image: np.ndarray, budget: int, recent: int) -> list[int]:
    """The paper's rule for one head, written out: the newest; of the others words before image positions."""
    older = range(len(sums) - recent)
    ranked = sorted(older, key=lambda j: (bool(image[j]), -sums[j]))
    return sorted([*ranked[: budget - recent], *range(len(sums) - recent, len(sums))])


def pivotal(keys: np.ndarray, rows: np.ndarray, kept: list[int]) -> np.ndarray:
    """What is kept [n, D] once every other row went into that of the most similar key, by way of their middle."""
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    groups = {c: [rows[c]] for c in kept}
    for e in set(range(len(rows))) - set(kept):
        c = kept[int(np.argmax(unit[kept] @ unit[e]))]
        groups[c].append((rows[e] + rows[c]) / 2)
    return np.array([np.mean(groups[c], 0) for c in kept])


def positions(state: State, row: int = 0) -> list[list[list[int]]]:
    """What each layer and head holds in one row."""
    found = [layer.held().places().expand(len(state.lengths), KV_HEADS, -1)[row].tolist() for layer in state.cache.layers]
    return [[[p for p in head if p >= 0] for head in layer] for layer in found]


def stored(state: State) -> list[tuple[Tensor, Tensor]]:
    return [layer.group.store.read() for layer in state.cache.layers]


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("keep", [0.2, 0.9])
def test_choice_and_merge_equal_the_papers(keep: float, chunk: int | None) -> None:
    """With 0.2 not all words stay, with 0.9 all of them and some of the image; every head keeps as many."""
    image, sums, keys, values = truth()
    budget = round(keep * len(image))
    recent = round(0.25 * budget)
    policy, state = LookM(keep=keep, recent=0.25), None
    with attached(here := session(**({"chunk_size": chunk} if chunk else {})), policy):
        state = prefilled(here, one())
    for layer in range(2):
        for head in range(KV_HEADS):
            kept = choice(sums[layer][head], image, budget, recent)
            assert positions(state)[layer][head] == kept
            for got, rows in zip(stored(state)[layer], (keys, values), strict=True):
                wanted = pivotal(keys[layer][head], rows[layer][head], kept)
                np.testing.assert_allclose(got[0, head].numpy(), wanted, rtol=1e-4, atol=1e-5)
    words = {j for j in range(len(image)) if not image[j]}
    assert all((words <= set(head)) == (keep == 0.9) for layer in positions(state) for head in layer)


def test_a_layer_with_a_full_budget_is_untouched_bit_for_bit() -> None:
    here = session()
    whole = stored(prefilled(here, one()))
    with attached(here, LookM(keep=0.6, layers="given", layer_shares="9, 1")):
        state = prefilled(here, one())
    assert all(torch.equal(a, b) for a, b in zip(stored(state)[0], whole[0], strict=True))
    assert [layer.stored for layer in state.cache.layers] == [len(truth()[0]), round(0.2 * len(truth()[0]))]


@pytest.mark.parametrize("chunk", [None, 16])
def test_without_prior_and_merging_it_is_h2o_made_once(chunk: int | None) -> None:
    here = session(**({"chunk_size": chunk} if chunk else {}))
    found = []
    for policy in (LookM(keep=0.3, text_prior=False, merge="none"), H2O(keep=0.3, when="prefill")):
        with attached(here, policy):
            found.append(prefilled(here, one()))
    assert positions(found[0]) == positions(found[1])
    for a, b in zip(stored(found[0]), stored(found[1]), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_of_words_alone_it_chooses_as_h2o() -> None:
    text, found = make_session(), []
    for policy in (LookM(keep=0.3), H2O(keep=0.3, when="prefill")):
        with attached(text, policy):
            found.append(prefill(text, prompt(40)))
    assert positions(found[0]) == positions(found[1])
    assert not torch.equal(stored(found[0])[1][1], stored(found[1])[1][1])  # but it merges
    with attached(text, LookM(keep=0.3, text_rule="keep_all_text")):
        assert prefill(text, prompt(40)).cache.stored() == 40


def test_every_word_stays_over_the_budget_if_asked() -> None:
    """As in the released code. A row without an image beside it keeps everything, and each row what it keeps alone."""
    image = truth()[0]
    budget, here = round(0.2 * len(image)), session()
    recent = round(0.5 * budget)
    words = {j for j in range(len(image)) if not image[j]}
    text = Item(id="words", prompt="The cat sat on the mat.", ignore_eos=True)
    with attached(here, LookM(keep=0.2, text_rule="keep_all_text")):
        state, alone, both = prefilled(here, one()), prefilled(here, text), prefilled(here, one(), text)
    newest = set(range(len(image) - recent, len(image)))
    assert all(set(head) == words | newest for layer in positions(state) for head in layer)
    assert len(words | newest) > budget
    assert alone.cache.stored() == alone.lengths[0]
    assert (positions(both), positions(both, 1)) == (positions(state), positions(alone))


def test_image_positions_are_known_behind_a_policy_that_drops_some() -> None:
    """FastV's later layers get half of the image tokens; chunks of decoding are words."""
    here, marked = seeing_session(tiny_vision.llava_folder(4)), []
    with attached(here, FastV(keep=0.5, layer=2)), here.hooked(here.observers, LookM().mark):
        state = prefilled(here, one())
        here.family.step(here, state, torch.tensor([[7]]))
        marked = [layer.held().tracked[IMAGE][0, 0] for layer in state.cache.layers]
    assert [int(m.sum()) for m in marked] == [64, 64, 32, 32]
    assert not any(m[-1] for m in marked)


def test_answers_are_merged_too_where_asked() -> None:
    """While answering, between chunks, and in heads of different lengths the cache stays within its budget."""
    here = session(chunk_size=16)
    policy = LookM(keep=0.3, when="both", every=3, between_chunks=True, heads="adaptive", filter=True, merge="weighted")
    with attached(here, policy):
        trace = run_items(here, [image_item(id="a"), image_item(id="b", prompt="Why?")], 9)
    assert trace.counts["cached_tokens"] <= 2 * (0.3 * len(truth()[0]) + 3)  # a head is as long as its longest row
    assert here.acted["look-m"] > 0
    assert [len(row) for row in tokens(trace)] == [9, 9]
    text = make_session()
    with attached(text, LookM(keep=0.5, when="both", every=2)):
        assert generate(text, [prompt(30)], new=8).counts["cached_tokens"] <= 16


def test_only_the_end_of_the_prompt_may_be_merged_into_a_packed_cache() -> None:
    def said(text: str) -> list[str]:
        return [p.message for p in pipeline_problems(parse_pipeline(text), catalogue())]

    assert said("look-m+kivi") == said("look-m:when=both,merge=none+kivi") == []
    assert "kv.dtype" in said("look-m:when=both+kivi")[0]
