"""Models with a running state: the studio's loop against the library's own passes over the whole text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from studio_state.pipeline import Pipeline, Step
from studio_state.problems import pipeline_problems
from tests.methods.driving import generate, info_of, library_model, make_session, prompt
from tests.tiny_states import FOLDERS
from workers.families.batches import make_batch
from workers.mechanisms.state_layer import StateLayer
from workers.methods import catalogue
from workers.policies.kv.snapkv import SnapKV

LENGTH, NEW = 37, 12
STATE_BYTES = 4 * (128 * 16 + (128 + 2 * 16) * 4)  # of one layer in float32: recurrent 8 x 16 x 16, convolution 160 channels x 4


def whole_text(name: str, ids: list[int]) -> torch.Tensor:
    """Log-probabilities after every token, in one pass without any cache."""
    with torch.inference_mode():
        logits = library_model(FOLDERS[name](), "eager")(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("chunk", [None, 16, 5])
def test_prefill_and_steps_equal_one_pass_over_the_whole_text(name: str, chunk: int | None) -> None:
    session = make_session(FOLDERS[name](), chunk_size=chunk)
    text, more = prompt(LENGTH), prompt(NEW, seed=1)
    with torch.inference_mode():
        state = session.family.prefill(session, make_batch([text], 0, session.device))
        got = session.family.force(session, state, more)
    torch.testing.assert_close(got, whole_text(name, text + more)[LENGTH - 1 : -1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
def test_greedy_text_is_what_passes_over_the_whole_text_choose(name: str) -> None:
    text = prompt(LENGTH, seed=2)
    trace = generate(make_session(FOLDERS[name]()), [text], NEW)
    expected: list[int] = []
    for _ in range(NEW):
        expected.append(int(whole_text(name, text + expected)[-1].argmax()))
    assert trace.results[0].token_ids == expected


@pytest.mark.parametrize("name", FOLDERS)
def test_a_padded_batch_writes_what_its_rows_write_alone(name: str) -> None:
    texts = [prompt(31, seed=3), prompt(18, seed=4)]
    session = make_session(FOLDERS[name]())
    together = generate(session, texts, NEW)
    for row, text in enumerate(texts):
        assert together.results[row].token_ids == generate(session, [text], NEW).results[0].token_ids


@pytest.mark.parametrize("name", FOLDERS)
def test_a_copy_of_the_cache_goes_its_own_way(name: str) -> None:
    session = make_session(FOLDERS[name]())
    with torch.inference_mode():
        state = session.family.prefill(session, make_batch([prompt(LENGTH)], 0, session.device))
        before = state.logits.clone()
        from dataclasses import replace

        first = session.family.force(session, replace(state, cache=state.cache.clone()), prompt(NEW, seed=5))
        session.family.force(session, replace(state, cache=state.cache.clone()), prompt(NEW, seed=6))
        again = session.family.force(session, replace(state, cache=state.cache.clone()), prompt(NEW, seed=5))
    assert torch.equal(first, again)
    assert torch.equal(before, state.logits)


def test_the_bytes_are_the_state_and_do_not_grow() -> None:
    for length in (20, 40):
        counts = generate(make_session(FOLDERS["mamba2"]()), [prompt(length)], NEW).counts
        assert counts["kv_bytes"] == counts["prefill_kv_bytes"] == 2 * STATE_BYTES
    growth = []
    for length in (20, 40):
        counts = generate(make_session(FOLDERS["bamba"]()), [prompt(length)], NEW).counts
        growth.append(counts["kv_bytes"])
        assert counts["cached_tokens"] == length + NEW - 1
    assert growth[1] - growth[0] == 20 * 2 * 2 * 16 * 4  # one layer of three: keys and values of 2 heads, 16 wide, float32


def test_an_evictor_acts_on_the_layers_that_attend() -> None:
    session = make_session(FOLDERS["bamba"]())
    policy = SnapKV(keep=0.5, window=4)
    with policy.attach(session):
        counts = generate(session, [prompt(40)], NEW).counts
    assert counts["kept_prompt_tokens"] == 20
    with torch.inference_mode():
        state = session.family.prefill(session, make_batch([prompt(40)], 0, session.device))
    kinds = [(isinstance(layer, StateLayer), layer.keeps_kv) for layer in state.cache.layers]
    assert kinds == [(True, False), (False, True), (True, False)]


@pytest.mark.parametrize("name", FOLDERS)
def test_parts_are_found(name: str) -> None:
    session = make_session(FOLDERS[name]())
    parts: Any = session.family.parts(session.model)
    info = info_of(FOLDERS[name]())
    assert len(parts["layers"]) == info.layers
    assert len(parts["attentions"]) == info.attention_layers
    assert parts["linears"]


def test_what_needs_keys_and_values_is_refused_where_there_are_none() -> None:
    cards = catalogue()
    for policy in ("snapkv", "kivi", "streamingllm", "h2o", "knorm", "promptdistill"):
        pipeline = Pipeline(steps=(Step(policy=policy),))
        assert any(
            "has no attention layers" in p.message for p in pipeline_problems(pipeline, cards, info_of(FOLDERS["mamba2"]()))
        )
        assert not any(
            "has no attention layers" in p.message for p in pipeline_problems(pipeline, cards, info_of(FOLDERS["bamba"]()))
        )
