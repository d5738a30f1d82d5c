"""Expected attention against numpy: every future position's rotation written out, queries from the library's own projections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from tests import tiny
from tests.methods.driving import attached, make_session, prefill, prompt
from tests.methods.test_budgets import positions
from tests.methods.unturned import library_states, rotation
from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.cache import StudioCache
from workers.mechanisms.rotary import Rotary
from workers.policies.kv.expected_attention import QUERIES, ExpectedAttention, Moments

FUTURE = 12


def expected_scores(states: dict[str, np.ndarray], covariance: bool, value_norm: bool, epsilon: float = 0.0) -> np.ndarray:
    """The paper's score [H, L - 4] of what stands behind the four sinks, query head by query head."""
    query, key, value = states["q"][:, 4:], states["key"][:, 4:], states["value"][:, 4:]
    length, width = states["q"].shape[1:]
    turns = [rotation(length + i, width) for i in range(FUTURE)]  # the next position is the prompt's length
    groups = len(query) // len(key)
    scores = []
    for h, (k, v) in enumerate(zip(key, value, strict=True)):
        of_heads = []
        for q in query[h * groups : (h + 1) * groups]:
            mean = np.mean([turn @ q.mean(0) for turn in turns], 0)  # brute force over the future positions
            logits = k @ mean / np.sqrt(width)
            if covariance:
                turn = np.mean(turns, 0)
                spread = turn @ np.cov(q.T, bias=True) @ turn.T
                logits += np.array([x @ spread @ x for x in k]) / (2 * width)
            weights = np.exp(logits - logits.max())
            of_heads.append(weights / weights.sum())
        expected = np.mean(of_heads, 0) + epsilon
        scores.append(expected * np.linalg.norm(v, axis=1) if value_norm else expected)
    return np.array(scores)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("folder", [tiny.llama_folder, tiny.qwen3_folder, tiny.mistral_folder])
def test_the_best_expected_stay(folder: Callable[[], Path], chunk: int | None) -> None:
    ids = prompt(40)
    session = make_session(folder(), chunk_size=chunk)
    for knobs in ({"covariance": True, "value_norm": True, "epsilon": 0.02}, {"covariance": False, "value_norm": False}):
        with attached(session, ExpectedAttention(keep=0.4, future=FUTURE, **knobs)):
            kept = positions(prefill(session, ids))
        for layer, states in zip(kept, library_states(folder(), ids), strict=True):
            scores = expected_scores(states, **knobs)
            assert layer == [[0, 1, 2, 3, *sorted((np.argsort(-s)[:12] + 4).tolist())] for s in scores]


def test_moments_as_worked_by_hand() -> None:
    query = torch.tensor([[[[1.0, 0], [3, 0], [2, 3], [9, 9]]]])
    counted = torch.tensor([[True, True, True, False]])
    first, rest = Moments.of(query[:, :, :1], counted[:, :1]), Moments.of(query[:, :, 1:], counted[:, 1:])
    mean, covariance = first.plus(rest).mean_and_covariance()
    assert mean.tolist() == [[[2, 1]]]
    torch.testing.assert_close(covariance, torch.tensor([[[[2 / 3, 0], [0, 2]]]]))


def test_scores_as_worked_by_hand() -> None:
    """Two numbers a head, one future position at angle 0, a sink and keys along the axes: exp(mean / 2 + variance / 8)."""
    shape = {"hidden_size": 2, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 2, "vocab_size": 3}
    rotary, cache = Rotary(LlamaModel(LlamaConfig(**shape)), "tiny"), StudioCache(1)
    states, last = torch.tensor([[[[5.0, 5], [1, 0], [0, 1], [0, 0]]]]), torch.tensor([[-1]])  # so that the next position is 0
    cache.layers[0].append(states, states, torch.arange(4)[None], 4)
    call = AttentionCall(0, states[:, :, :1], cache.layers[0], Forward(cache, "prefill", last), scaling=0.5)
    call.cache.notes[QUERIES] = Moments.of(torch.tensor([[[[0.0, 4], [4, 4]]]]), torch.ones(1, 2))
    got = ExpectedAttention(sinks=1, future=1, value_norm=False).unturned_scores(rotary, call)
    weights = np.exp([2 / 2 + 4 / 8, 4 / 2, 0])
    np.testing.assert_allclose(got[0, 0].numpy(), [0, *weights / weights.sum()], rtol=1e-5)


def test_the_answers_queries_count_in_its_own_branch_only() -> None:
    session, ids = make_session(), prompt(20)
    with attached(session, ExpectedAttention(keep=0.5, when="both", every=4)), torch.inference_mode():
        state = prefill(session, ids)
        branch = state.cache.clone()
        session.family.step(session, state, torch.tensor([[7, 8, 9]]))
    assert [layer.notes[QUERIES].number.tolist() for layer in state.cache.layers] == [[16 + 3]] * 2
    assert [layer.notes[QUERIES].number.tolist() for layer in branch.layers] == [[16]] * 2
