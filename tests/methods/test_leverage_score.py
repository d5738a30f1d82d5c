"""Leverage scores against the singular vectors of the library's own keys before rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.methods.driving import attached, make_session, prefill, prompt
from tests.methods.test_budgets import positions
from tests.methods.unturned import library_states
from workers.mechanisms.sketch import sketched
from workers.policies.kv.leverage_score import LeverageScore, leverage

WIDTH = 16  # of a head


def by_singular_vectors(x: np.ndarray) -> np.ndarray:
    """Squared lengths of the left singular vectors' rows [L], the mean of x [L, k] taken away."""
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return (u[:, s > s.max() * 1e-6] ** 2).sum(1)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("folder", [tiny.llama_folder, tiny.qwen3_folder])
@pytest.mark.parametrize("sketch", [0, WIDTH, 6])
def test_the_most_leverage_stays(folder: Callable[[], Path], chunk: int | None, sketch: int) -> None:
    ids = prompt(40, seed=1)
    session = make_session(folder(), chunk_size=chunk)
    with attached(session, LeverageScore(keep=0.5, sketch=sketch, ridge=0.0, sinks=2, recent=3)):
        kept = positions(prefill(session, ids))
    for layer, states in zip(kept, library_states(folder(), ids), strict=True):
        for head, keys in zip(layer, states["k"], strict=True):
            matrix = sketched(torch.eye(WIDTH, dtype=torch.float64), sketch).numpy()  # full width: nothing is projected
            scores = by_singular_vectors(keys @ matrix)
            scores[:2], scores[-3:] = 2, 2
            assert head == sorted(np.argsort(-scores)[:20].tolist())


def test_leverage_as_worked_by_hand() -> None:
    """Four points on one axis, 3, -1, -1, -1 from their mean, and a fifth row that is padding; then the corners of a rectangle."""
    x = torch.tensor([[3.0, 0], [-1, 0], [-1, 0], [-1, 0], [50, 50]], dtype=torch.float64) + 7.0
    real = torch.tensor([1.0, 1, 1, 1, 0], dtype=torch.float64)
    torch.testing.assert_close(leverage(x, real, 0.0), torch.tensor([9.0, 1, 1, 1, 0], dtype=torch.float64) / 12)
    shares = torch.tensor([9.0, 1, 1, 1, 0], dtype=torch.float64) / (12 + 0.5 * 6)  # the diagonal of x'x is 12 and 0
    torch.testing.assert_close(leverage(x, real, 0.5), shares)
    square = torch.tensor([[1.0, 2], [1, -2], [-1, 2], [-1, -2]], dtype=torch.float64)
    torch.testing.assert_close(leverage(square, torch.ones(4).double(), 0.0), torch.full((4,), 0.5).double())


def test_repeated_words_stay_in_the_order_of_the_text() -> None:
    """In the first layer they have the same keys before rotary embedding; rounding does not choose among them, newness does."""
    session, phrase = make_session(), prompt(10, seed=4)
    with attached(session, LeverageScore(keep=0.5, sinks=0, recent=0)):
        kept = positions(prefill(session, phrase * 4))
    for head in kept[0]:
        times = [[p // 10 for p in head if p % 10 == word] for word in range(10)]
        assert all(t == list(range(4 - len(t), 4)) for t in times)


def test_a_sketch_has_a_fixed_seed_and_mean_square_lengths() -> None:
    x = torch.randn(4, 2000, 64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(sketched(x, 16), sketched(x, 16))
    assert sketched(x, 16).shape == (4, 2000, 16)
    assert sketched(x, 64) is sketched(x, 0) is x
    assert sketched(x, 16).square().sum() / x.square().sum() == pytest.approx(1, abs=0.1)
