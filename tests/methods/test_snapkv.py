"""SnapKV against attention maps of the library's eager implementation, and its smoothing worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import tiny
from tests.methods.calling import attention_call, best, kept, library_maps
from tests.methods.driving import attached, make_session, prefill, prompt
from workers.policies.kv.snapkv import SnapKV

WINDOW = 8


def smoothed(votes: np.ndarray, kernel: int) -> np.ndarray:
    """Mean of each number [H, n] and its neighbours, of those that exist."""
    reach, n = kernel // 2, votes.shape[1]
    return np.stack([votes[:, max(0, i - reach) : min(n, i + reach + 1)].mean(1) for i in range(n)], 1)


@pytest.mark.parametrize("kernel", [1, 5])
@pytest.mark.parametrize("chunk", [None, 7])
def test_what_the_window_attends_to_stays_with_the_window(chunk: int | None, kernel: int) -> None:
    session, ids = make_session(chunk_size=chunk), prompt(60)
    with attached(session, SnapKV(keep=0.3, window=WINDOW, kernel=kernel)):
        found = kept(prefill(session, ids))
    for places, maps in zip(found, library_maps(tiny.llama_folder(), ids), strict=True):
        votes = maps[:, -WINDOW:, :-WINDOW].sum(1).reshape(2, 2, -1).mean(1)  # of the entries before the window
        chosen = best(smoothed(votes, kernel), 18 - WINDOW)
        assert np.array_equal(places, np.concatenate((chosen, np.tile(np.arange(52, 60), (2, 1))), 1))
    assert session.acted["snapkv"] == 2 * 42


def test_the_window_does_not_vote_for_its_neighbours_by_hand() -> None:
    """The newest of six positions asks: 0.10, 0.05, 0.05, 0.05, 0.05 for those before it and 0.70 for itself.

    Means of up to three of the five are 0.075, 0.0667, 0.05, 0.05, 0.05: what it asks of itself makes no neighbour better.
    """
    keys, query = torch.eye(6).expand(1, 1, 6, 6), torch.zeros(1, 1, 6, 6)
    query[0, 0, -1] = torch.tensor([0.10, 0.05, 0.05, 0.05, 0.05, 0.70]).log()
    policy, call = SnapKV(keep=0.5, window=1, kernel=3), attention_call(keys, query)
    torch.testing.assert_close(policy.scores(call)[0, 0, :5], torch.tensor([0.075, 0.2 / 3, 0.05, 0.05, 0.05]))
    chosen = policy.choose(call)
    assert isinstance(chosen, torch.Tensor)
    assert chosen.tolist() == [[[0, 1, 5]]]
