"""The innovation cache against log-likelihoods of the library's own passes over the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import log
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny, tiny_vision
from tests.methods.calling import attention_call, kept
from tests.methods.driving import library_model, make_session, prefill, prompt, seeing_session
from tests.methods.seeing import given, one, prefilled
from workers.mechanisms.surprise import SURPRISE, noted_surprise
from workers.policies.kv.innovation_cache import InnovationCache


def nats(ids: Sequence[int], model: Any = None, **inputs: Any) -> np.ndarray:
    """Surprise of every token by one pass of the library, numpy from its logits on; the first as a guess among all."""
    model = model or library_model(tiny.llama_folder(), "eager")
    with torch.inference_mode():
        logits = model(**(inputs or {"input_ids": torch.tensor([list(ids)])})).logits[0].double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    chances = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    return np.array([log(logits.shape[-1]), *(-np.log(chances[i, t]) for i, t in enumerate(ids[1:]))])


@pytest.mark.parametrize("chunk", [None, 7])
def test_the_most_surprising_positions_stay_in_every_layer_and_head(chunk: int | None) -> None:
    session, ids = make_session(chunk_size=chunk), prompt(100)
    with InnovationCache(keep=0.4, sinks=2, window=8).attach(session):
        state = prefill(session, ids)
    middle = np.argsort(-nats(ids)[2:92], kind="stable")[:30] + 2
    expected = [0, 1, *np.sort(middle), *range(92, 100)]
    for positions in kept(state):
        assert positions.tolist() == [expected] * 2
    assert session.acted["innovation-cache"] == 2 * 60


@pytest.mark.parametrize("steps", [1, 5])
def test_what_is_written_surprises_too(steps: int) -> None:
    """The same numbers by the decode path, one token or several at once, for two continuations of one context."""
    session, ids = make_session(), prompt(30)
    with InnovationCache(keep=0.9, when="decode", every=256).attach(session), torch.inference_mode():
        state = prefill(session, ids)
        for seed in (1, 2):
            more = prompt(10, seed=seed)
            branch = replace(state, cache=state.cache.clone())
            for at in range(0, 10, steps):
                session.family.step(session, branch, torch.tensor([more[at : at + steps]]))
            for layer in branch.cache.layers:
                noted = layer.held().tracked[SURPRISE][0].double().numpy()
                np.testing.assert_allclose(noted, [nats(ids + more)] * 2, rtol=1e-4, atol=1e-4)


def test_while_answering_the_least_surprising_leave() -> None:
    """Budget of 20: two sinks, four newest and the 14 most surprising of what was ever held."""
    session, ids = make_session(), prompt(40)
    with InnovationCache(keep=0.5, sinks=2, window=4, when="both", every=3).attach(session), torch.inference_mode():
        state = prefill(session, ids)
        before = dict(zip(kept(state)[0][0].tolist(), state.cache.layers[0].held().tracked[SURPRISE][0, 0].tolist(), strict=True))
        for token in prompt(3, seed=5):
            session.family.step(session, state, torch.tensor([[token]]))
    held = state.cache.layers[0].held()
    now = dict(zip(kept(state)[0][0].tolist(), held.tracked[SURPRISE][0, 0].tolist(), strict=True))
    known = before | now  # the newest are guarded, so their surprise is known
    middle = sorted((p for p in known if 2 <= p < 39), key=lambda p: -known[p])[:14]
    assert list(now) == [0, 1, *sorted(middle), 39, 40, 41, 42]


def test_image_tokens_are_ranked_like_words_by_hand() -> None:
    call = attention_call(torch.zeros(1, 2, 8, 4))
    unknown = float("nan")
    noted = torch.tensor([7.0, unknown, unknown, unknown, unknown, 1.0, 9.0, 4.0])
    call.cache.track(SURPRISE, noted.expand(1, 2, -1))
    # 0.618, 0.236, 0.854 and 0.472 of four words in order 1, 4, 7, 9
    assert noted_surprise(call).tolist() == [[7.0, 7.0, 1.0, 9.0, 4.0, 1.0, 9.0, 4.0]]


def test_words_around_an_image_surprise_as_the_library_says() -> None:
    folder = tiny_vision.llava_folder()
    session, item, what = seeing_session(folder), one(), given(folder, one())
    with InnovationCache(keep=0.5, sinks=0, window=1).attach(session):
        state = prefilled(session, item)
    expected = nats(what.ids.tolist(), what.model, inputs_embeds=what.embeds[None])
    expected[what.places] = np.nan
    positions = kept(state)[0][0]
    noted = state.cache.layers[0].held().tracked[SURPRISE][0, 0].double().numpy()
    np.testing.assert_allclose(noted, expected[positions], rtol=1e-4, atol=1e-4)
    images = np.isin(positions, what.places).sum()
    assert abs(images / len(what.places) - 0.5) < 0.05
