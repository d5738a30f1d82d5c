"""H2O against attention maps of the library's eager implementation, summed by numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests import tiny
from tests.methods.driving import library_model, make_session, prefill, prompt
from workers.mechanisms.gathered_attention import SUMS
from workers.policies.kv.h2o import H2O
from workers.session import Session


def library_sums(session: Session, ids: Sequence[int]) -> list[np.ndarray]:
    """Attention received per position [H, L], per layer, mean over the query heads of a KV head."""
    with torch.inference_mode():
        maps = library_model(tiny.llama_folder(), "eager")(input_ids=torch.tensor([list(ids)]), output_attentions=True).attentions
    heads = session.info.kv_heads
    return [m[0].double().numpy().sum(1).reshape(heads, -1, m.shape[-1]).mean(1) for m in maps]


def choose(sums: np.ndarray, budget: int, recent: int) -> np.ndarray:
    """The paper's rule, written out: newest ``recent`` and the best of the others."""
    length = sums.shape[1]
    return np.array(
        [sorted([*np.argsort(-s[: length - recent])[: budget - recent], *range(length - recent, length)]) for s in sums]
    )


@pytest.mark.parametrize("chunk", [None, 7, 1])
def test_sums_and_choice_after_the_prefill(chunk: int | None) -> None:
    session, ids = make_session(chunk_size=chunk), prompt(40)
    expected = library_sums(session, ids)
    with H2O(keep=0.5).attach(session):
        state = prefill(session, ids)
    for layer, sums in zip(state.cache.layers, expected, strict=True):
        kept = choose(sums, budget=20, recent=10)
        assert np.array_equal(layer.group.positions[0].numpy(), kept)
        np.testing.assert_allclose(layer.group.tracked[SUMS][0].numpy(), np.take_along_axis(sums, kept, 1), rtol=1e-4, atol=1e-5)


def test_sums_go_on_while_decoding() -> None:
    """Without an eviction the running sums equal those of one long forward over prompt and new tokens."""
    session, ids, later = make_session(), prompt(30), [7, 8, 9, 10]
    with session.hooked(session.observers, H2O().add), torch.inference_mode():
        state = prefill(session, ids)
        session.family.step(session, state, torch.tensor([later[:1]]))
        session.family.step(session, state, torch.tensor([later[1:]]))
    for layer, sums in zip(state.cache.layers, library_sums(session, ids + later), strict=True):
        np.testing.assert_allclose(layer.group.tracked[SUMS][0].numpy(), sums, rtol=1e-4, atol=1e-5)


def test_the_cache_stays_bounded() -> None:
    session, sizes = make_session(), []
    with H2O(keep=0.5, every=4).attach(session), torch.inference_mode():
        state = prefill(session, prompt(40))
        for token in range(5, 15):
            session.family.step(session, state, torch.tensor([[token]]))
            sizes.append(state.cache.stored())
    assert sizes == [21, 22, 23, 20, 21, 22, 23, 20, 21, 22]
    for layer in state.cache.layers:
        assert layer.group.tracked[SUMS].shape == (1, 2, 22)
        assert set(range(40, 50)) <= set(layer.group.positions[0, 0].tolist())  # the newest half of the budget


def test_padded_queries_give_nothing() -> None:
    session, short = make_session(), prompt(25, seed=1)
    with session.hooked(session.observers, H2O().add):
        state = prefill(session, prompt(40), short)
        alone = prefill(session, short)
    for both, one in zip(state.cache.layers, alone.cache.layers, strict=True):
        sums = both.group.tracked[SUMS][1]
        torch.testing.assert_close(sums[:, 15:], one.group.tracked[SUMS][0], rtol=1e-4, atol=1e-5)
        assert not sums[:, :15].any()
