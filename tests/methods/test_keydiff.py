"""KeyDiff against cosines computed by numpy from the library's own cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests import tiny
from tests.methods.calling import attention_call, best, kept
from tests.methods.driving import attached, library_model, make_session, prefill, prompt
from workers.policies.kv.keydiff import KeyDiff


def similarity(keys: np.ndarray) -> np.ndarray:
    """Cosine of each key [L, D] to the mean of the normalised ones, one by one."""
    anchor = np.mean([k / np.linalg.norm(k) for k in keys], axis=0)
    return np.array([k @ anchor / (np.linalg.norm(k) * np.linalg.norm(anchor)) for k in keys])


@pytest.mark.parametrize("chunk", [None, 7])
def test_keys_unlike_the_mean_stay(chunk: int | None) -> None:
    session, ids, cache = make_session(chunk_size=chunk), prompt(40), DynamicCache()
    with torch.inference_mode():
        library_model(tiny.llama_folder(), "eager")(input_ids=torch.tensor([ids]), past_key_values=cache)
    with attached(session, KeyDiff(keep=0.25)):
        found = kept(prefill(session, ids))
    for places, layer in zip(found, cache.layers, strict=True):
        cosines = np.array([similarity(head) for head in layer.keys[0].double().numpy()])
        assert np.array_equal(places, best(-cosines, 10))


def test_a_choice_worked_by_hand() -> None:
    """Directions east (twice), north and west, whatever their length: the mean points to north-east by (1/4, 1/4)."""
    keys = torch.tensor([[[[5.0, 0], [1, 0], [0, 3], [-2, 0]]]])
    expected = torch.tensor([[[-1.0, -1, -1, 1]]]) / 2**0.5
    torch.testing.assert_close(KeyDiff().scores(attention_call(keys)), expected)
    chosen = KeyDiff(keep=0.5, recent=2).choose(attention_call(keys))
    assert chosen is not None
    assert chosen.tolist() == [[[2, 3]]]


def test_padding_does_not_turn_the_anchor() -> None:
    keys = torch.randn(2, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    alone = KeyDiff().scores(attention_call(keys[1:, :, 4:]))
    padded = KeyDiff().scores(attention_call(keys, lengths=[9, 5]))
    torch.testing.assert_close(padded[1:, :, 4:], alone)


def test_the_newest_positions_are_protected_where_asked() -> None:
    session = make_session()
    with attached(session, KeyDiff(keep=0.25, recent=6)):
        found = kept(prefill(session, prompt(40)))
    assert all(set(range(34, 40)) <= set(head) and len(head) == 10 for layer in found for head in layer)
