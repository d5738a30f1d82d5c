"""L2-norm eviction against norms computed by numpy from the library's own cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests.methods.driving import make_session, prefill, prompt
from workers.policies.kv.knorm import KNorm


def library_keys(session: object, ids: list[int]) -> list[np.ndarray]:
    """Rotated keys [H, L, D] per layer from the library's own cache."""
    cache = DynamicCache()
    with torch.inference_mode():
        session.model(input_ids=torch.tensor([ids]), past_key_values=cache)  # type: ignore[attr-defined]
    return [layer.keys[0].numpy() for layer in cache.layers]


@pytest.mark.parametrize("chunk", [None, 7])
def test_the_shortest_keys_stay(chunk: int | None) -> None:
    session, ids = make_session(chunk_size=chunk), prompt(40)
    with KNorm(keep=0.25).attach(session):
        state = prefill(session, ids)
    for layer, keys in zip(state.cache.layers, library_keys(session, ids), strict=True):
        norms = np.sqrt((keys.astype(np.float64) ** 2).sum(-1))
        expected = np.sort(np.argsort(norms, axis=1, kind="stable")[:, :10], axis=1)
        assert layer.group.positions is not None
        assert np.array_equal(layer.group.positions[0].numpy(), expected)
    assert session.acted["knorm"] == 2 * 30


def test_nothing_is_protected_unless_asked() -> None:
    session, ids = make_session(), prompt(40)
    with KNorm(keep=0.25).attach(session):
        free = prefill(session, ids)
    with KNorm(keep=0.25, recent=6).attach(session):
        guarded = prefill(session, ids)
    newest = [
        set(range(34, 40)) <= set(p.tolist()) for x in (free, guarded) for g in x.cache.layers for p in g.group.positions[0]
    ]
    assert not all(newest[:4])
    assert all(newest[4:])
    assert free.cache.stored() == guarded.cache.stored() == 10


def test_skipped_layers_keep_everything() -> None:
    session = make_session()
    with KNorm(keep=0.25, skip_layers=1).attach(session):
        state = prefill(session, prompt(40))
    assert [layer.stored for layer in state.cache.layers] == [40, 10]
