"""LagKV against a loop over chunks in numpy, on the library's own cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests import tiny
from tests.methods.calling import attention_call, kept
from tests.methods.driving import attached, generate, library_model, make_session, prefill, prompt
from workers.policies.kv.lagkv import LagKV


def deviation(chunk: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Softmax of each entry's deviation over channels [lag, D], scaled by the range of the chunk after it."""
    low, high = after.min(0), after.max(0)
    stds = np.array([np.std((x - low) / (high - low), ddof=1) for x in chunk])
    return np.exp(stds) / np.exp(stds).sum()


def chosen(keys: np.ndarray, values: np.ndarray, sinks: int, lag: int, each: list[int]) -> list[int]:
    """Sinks, the best ``each`` of every chunk but the last, and all from the last full chunk on."""
    length = len(keys)
    starts = list(range(sinks, length - lag + 1, lag))
    stays = [*range(sinks), *range(starts[-1], length)]
    for start, count in zip(starts[:-1], each, strict=True):
        here, after = slice(start, start + lag), slice(start + lag, start + 2 * lag)
        score = deviation(keys[here], keys[after]) + deviation(values[here], values[after])
        stays += [start + int(i) for i in np.argsort(-score)[:count]]
    return sorted(stays)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize(("keep", "each"), [(0.5, [2, 2, 2, 3]), (0.35, [0, 0, 1, 1]), (0.1, [0, 0, 0, 0])])
def test_every_chunk_keeps_as_many_of_its_best(keep: float, each: list[int], chunk: int | None) -> None:
    """Of 46 tokens, 2 sinks and the 12 from the last full chunk on stay; four chunks of 8 share the rest of the budget."""
    session, ids, cache = make_session(chunk_size=chunk), prompt(46), DynamicCache()
    with torch.inference_mode():
        library_model(tiny.llama_folder(), "eager")(input_ids=torch.tensor([ids]), past_key_values=cache)
    with attached(session, LagKV(keep=keep, sinks=2, lag=8)):
        found = kept(prefill(session, ids))
    for places, layer in zip(found, cache.layers, strict=True):
        for head, keys, values in zip(places, layer.keys[0].double().numpy(), layer.values[0].double().numpy(), strict=True):
            assert head.tolist() == chosen(keys, values, 2, 8, each)


def test_scores_worked_by_hand() -> None:
    """One sink, two chunks of 2, one entry behind: only the first chunk is compared, and a constant channel counts as 0.

    The next chunk's range is 0 to 2 in the first channel and nothing in the second: the entries scale to (0.5, 0) and
    (2, 0), whose deviations are 0.5 / sqrt 2 and 2 / sqrt 2. Values are the keys.
    """
    keys = torch.tensor([[[[9.0, 9], [1, 4], [4, 7], [0, 3], [2, 3], [9, 9]]]])
    raw = LagKV(sinks=1, lag=2, compete=True).scores(attention_call(keys))
    assert raw is not None
    low = 1 / (1 + np.exp(1.5 / 2**0.5))
    np.testing.assert_allclose(raw[0, 0].numpy(), [np.inf, low, 1 - low, np.inf, np.inf, np.inf], rtol=1e-6)
    kept_places = LagKV(keep=0.84, sinks=1, lag=2).choose(attention_call(keys))
    assert kept_places is not None
    assert kept_places.tolist() == [[[0, 2, 3, 4, 5]]]


def test_short_prompts_stay_whole_and_say_why() -> None:
    policy, session = LagKV(keep=0.1), make_session()
    with attached(session, policy):
        assert prefill(session, prompt(35)).cache.stored() == 35
        assert "lagkv" not in session.acted
        assert prefill(session, prompt(36)).cache.stored() == 20  # 4 sinks and a window of 16
    assert "lag = 16" in policy.why_idle(session)
    assert "under 36 tokens" in policy.why_idle(session)


@pytest.mark.parametrize("heads", ["uniform", "adaptive"])
def test_answers_are_cut_too_where_asked(heads: str) -> None:
    """A row that is too short for the method keeps what it says alone while its neighbour is cut."""
    session, prompts = make_session(), [prompt(60), prompt(9, seed=1)]
    with attached(session, LagKV(keep=0.5, lag=4, sinks=2, when="both", every=1, compete=True, heads=heads)):  # type: ignore[arg-type]
        together = generate(session, prompts, new=12)
        alone = [generate(session, [p], new=12) for p in prompts]
    assert [r.token_ids for r in together.results] == [one.results[0].token_ids for one in alone]
    assert alone[0].counts["cached_tokens"] == 30
    assert alone[1].counts["cached_tokens"] <= 2 + 2 * 4
