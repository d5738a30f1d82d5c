"""Random eviction against SplitMix64 in Python's own integers."""

from __future__ import annotations

import numpy as np
import pytest

from tests.methods.calling import best, kept
from tests.methods.driving import attached, make_session, prefill, prompt
from workers.policies.kv.random_kv import RandomKV

MASK = 2**64 - 1


def mixed(x: int) -> int:
    """One step of SplitMix64, as in Java's SplittableRandom."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def draw(*keys: int) -> float:
    state = 0
    for key in keys:
        state = mixed((state + key) & MASK)
    return state % 2**53 / 2**53


def run(chunk: int | None = None, **knobs: object) -> list[np.ndarray]:
    session = make_session(chunk_size=chunk)
    with attached(session, RandomKV(**knobs)):  # type: ignore[arg-type]
        return kept(prefill(session, prompt(40)))


@pytest.mark.parametrize(("chunk", "between"), [(None, False), (7, False), (7, True)])
def test_kept_follows_from_seed_layer_head_and_position_alone(chunk: int | None, between: bool) -> None:
    for layer, places in enumerate(run(chunk, keep=0.25, seed=3, between_chunks=between)):
        draws = np.array([[draw(3, layer, head, position) for position in range(40)] for head in range(2)])
        assert np.array_equal(places, best(draws, 10))


def test_seeds_layers_and_heads_differ_and_budgets_are_nested() -> None:
    sets = [frozenset(head.tolist()) for seed in (0, 1) for layer in run(keep=0.25, seed=seed) for head in layer]
    assert len(set(sets)) == 8
    small, large = run(keep=0.25), run(keep=0.5)
    assert all(set(a) < set(b) for x, y in zip(small, large, strict=True) for a, b in zip(x, y, strict=True))


def test_it_protects_what_a_rival_protects() -> None:
    free, guarded = run(keep=0.25), run(keep=0.25, sinks=3, recent=4)
    guard = {0, 1, 2, 36, 37, 38, 39}
    assert all(guard < set(head) and len(head) == 10 for layer in guarded for head in layer)
    assert not any(guard < set(head) for layer in free for head in layer)
