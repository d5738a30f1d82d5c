"""CurDKV against numpy, window by window, from the library's own cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import tiny
from tests.methods.driving import attached, make_session, prefill, prompt
from tests.methods.test_budgets import positions
from tests.methods.unturned import library_states
from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.cache import StudioCache
from workers.mechanisms.sketch import sketched
from workers.policies.kv.cur import CUR


def shares(x: np.ndarray, window: int) -> np.ndarray:
    """Squared lengths of the rows of x [L, D] over their window's mean [L]."""
    size = (x**2).sum(1)
    return np.concatenate([size[i : i + window] / size[i : i + window].mean() for i in range(0, len(size), window)])


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("leverage", ["product", "mean", "value", "key"])
def test_what_stands_out_stays(leverage: str, chunk: int | None) -> None:
    session, ids = make_session(chunk_size=chunk), prompt(42)  # two windows and a part of a third
    for sketch in (0, 8):
        with attached(session, CUR(keep=0.5, leverage=leverage, sketch=sketch)):
            kept = positions(prefill(session, ids))
        matrix = sketched(torch.eye(16, dtype=torch.float64), sketch).numpy()
        for layer, states in zip(kept, library_states(tiny.llama_folder(), ids), strict=True):
            for head, k, v in zip(layer, states["key"], states["value"], strict=True):
                key, value = shares(k @ matrix, 16), shares(v @ matrix, 16)
                scores = {"product": key * value, "mean": key + value, "value": value, "key": key}[leverage]
                scores[:4] = np.inf
                assert head == sorted(np.argsort(-scores)[:21].tolist())


def test_scores_as_worked_by_hand() -> None:
    """Windows of two, behind one padding; the last entry stands alone in its window and gets no more than the mean."""
    cache, at = StudioCache(1), torch.tensor([[-1, 0, 1, 2, 3, 4]])
    keys = torch.tensor([9.0, 1, 3, 2, 2, 5]).view(1, 1, 6, 1)
    values = torch.tensor([9.0, 2, 2, 1, 2, 7]).view(1, 1, 6, 1)
    cache.layers[0].append(keys, values, at, 6, padded=True)
    call = AttentionCall(0, keys[:, :, :0], cache.layers[0], Forward(cache, "prefill", at, prompt_lengths=[5]), 1.0)
    key, value = [0, 1 / 5, 9 / 5, 1, 1, 1], [0, 1, 1, 2 / 5, 8 / 5, 1]
    for leverage, worth in (("product", np.multiply(key, value)), ("mean", np.add(key, value)), ("value", np.array(value))):
        got = CUR(local_window=2, leverage=leverage).scores(call)
        np.testing.assert_allclose(got[0, 0].numpy(), worth / worth.sum(), rtol=1e-6)
    together = CUR(local_window=0, leverage="key").scores(call)
    np.testing.assert_allclose(together[0, 0].numpy(), np.array([0, 1, 9, 4, 4, 25]) / 43, rtol=1e-6)
