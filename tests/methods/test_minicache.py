"""MiniCache against SLERP by numpy on the library's own cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests import tiny
from tests.methods.driving import attached, generate, library_model, make_session, prefill, prompt, tokens
from workers.families.llm import State
from workers.mechanisms.merged_layers import merge
from workers.policies.kv.minicache import MiniCache
from workers.policies.kv.streamingllm import StreamingLLM

FOUR = tiny.llama_folder("llama4", num_hidden_layers=4)


def library_cache(ids: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    cache = DynamicCache()
    with torch.inference_mode():
        library_model(FOUR, "eager")(input_ids=torch.tensor([ids]), past_key_values=cache)
    return [(x.keys[0].double().numpy(), x.values[0].double().numpy()) for x in cache.layers]


def merged(lower: np.ndarray, upper: np.ndarray, t: float, retention: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Both layers of one head [P, D] as they are restored, and how many entries stay apart."""
    lengths = [np.linalg.norm(x, axis=1) for x in (lower, upper)]
    angles = np.arccos((lower * upper).sum(1) / lengths[0] / lengths[1])
    apart = angles > angles.max() - retention * (angles.max() - angles.min())
    out = [lower.copy(), upper.copy()]
    for i in np.flatnonzero(~apart):
        a, b, omega = lower[i] / lengths[0][i], upper[i] / lengths[1][i], angles[i]
        common = (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)
        out[0][i], out[1][i] = common * lengths[0][i], common * lengths[1][i]
    return out[0], out[1], int(apart.sum())


@pytest.mark.parametrize("chunk", [None, 7])
def test_the_deep_half_is_restored_from_shared_directions(chunk: int | None) -> None:
    ids, session = prompt(40), make_session(FOUR, chunk_size=chunk)
    with MiniCache(retention=0.3).attach(session):
        state = prefill(session, ids)
    library, apart = library_cache(ids), [[], []]
    got = [[x[0].double().numpy() for x in layer.group.store.read()] for layer in state.cache.layers]
    for part in (0, 1):
        for layer in (0, 1):
            np.testing.assert_allclose(got[layer][part], library[layer][part], rtol=1e-4, atol=1e-4)
        for head in range(2):
            lower, upper, count = merged(library[2][part][head], library[3][part][head], 0.6, 0.3)
            np.testing.assert_allclose(got[2][part][head], lower, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(got[3][part][head], upper, rtol=1e-4, atol=1e-4)
            apart[part].append(count)
    floats = 2 * 40 * 2 * 16 * 4  # of a whole layer
    shared = sum(2 * ((40 - min(n)) * 16 * 4 + 40 * 4) for n in apart)  # directions and places, once
    own = sum(2 * ((40 - min(n)) * 4 + max(n) * 16 * 4) for n in apart)  # lengths and what stays apart, in each
    assert [layer.nbytes() for layer in state.cache.layers] == [floats, floats, shared + own, own]
    assert all(0 < n < 40 for part in apart for n in part)


def test_right_angles_opposites_and_equals_by_hand() -> None:
    """Halfway between right angles, with each layer's length; opposites have no way between them, so the nearer one counts."""
    lower = torch.tensor([[[[3.0, 0], [0, 2], [1, 0], [5, 0]]]])
    upper = torch.tensor([[[[0.0, 4], [0, 6], [-7, 0], [9, 0]]]])
    r = 0.5**0.5
    first, second = (x.read()[0, 0] for x in merge(lower, upper, 0.5, 0.0, None))
    torch.testing.assert_close(first[[0, 1, 3]], torch.tensor([[3 * r, 3 * r], [0, 2], [5, 0]]))
    torch.testing.assert_close(second[[0, 1, 3]], torch.tensor([[4 * r, 4 * r], [0, 6], [9, 0]]))
    for x, length, nearer in zip(merge(lower, upper, 0.6, 0.0, None), (1, 7), (-1, -1), strict=True):
        torch.testing.assert_close(x.read()[0, 0, 2], torch.tensor([nearer * length, 0.0]))
    apart = merge(lower, upper, 0.6, 0.6, torch.tensor([[[True, True, False, True]]]))  # the opposites are padding
    assert torch.equal(apart[1].read()[0, 0, [0, 1, 3]], upper[0, 0, [0, 1, 3]])
    assert apart[0].apart.tolist() == [[[[3, 0]]]]


def test_pairs_are_neighbours_counted_from_the_last_layer() -> None:
    assert MiniCache().pairs(4) == [(2, 3)]
    assert MiniCache().pairs(30) == [(i, i + 1) for i in range(16, 30, 2)]
    assert MiniCache(depth=0.0).pairs(5) == [(1, 2), (3, 4)]
    assert MiniCache().pairs(2) == MiniCache(depth=1.0).pairs(2) == [(0, 1)]
    assert MiniCache().pairs(1) == []


def bytes_of(state: State) -> int:
    """Different storages of the whole cache, each once."""
    found = {}
    for part in (p for layer in state.cache.layers for p in layer.group.store._old):
        for x in (part.shared.directions, part.shared.places, part.lengths, part.apart):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    recent = sum(x.untyped_storage().nbytes() for layer in state.cache.layers for x in layer.group.store._recent)
    return sum(found.values()) + recent


def test_new_entries_stay_as_they_are_and_leave_together() -> None:
    """StreamingLLM evicts the same positions in all layers: the pair goes on sharing, and so does a clone of it."""
    session = make_session()
    with attached(session, StreamingLLM(keep=0.5, when="both", every=4), MiniCache(retention=0.2)), torch.inference_mode():
        state = prefill(session, prompt(40), prompt(30, seed=1))
        twin = State(state.cache.clone(), state.next_position, state.logits, state.lengths, state.padded)
        for s in (state, twin):
            for token in range(9):
                session.family.step(session, s, torch.full((2, 1), 5 + token))
            assert s.cache.layers[0].stored == s.cache.layers[1].stored <= 24
            assert s.cache.layers[0].group.store.packed < 20
            assert bytes_of(s) == s.cache.nbytes()
        before = [x.clone() for layer in state.cache.layers for x in layer.group.store.read()]
        session.family.step(session, state, torch.full((2, 2), 7))
        state.cache.crop_newest(2)
    after = [x for layer in state.cache.layers for x in layer.group.store.read()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    with pytest.raises(RuntimeError, match="cannot be taken back"):
        state.cache.crop_newest(20)


def test_each_row_says_what_it_says_alone() -> None:
    session, prompts = make_session(), (prompt(40), prompt(23, seed=1), prompt(6, seed=2))
    with MiniCache(retention=0.3).attach(session):
        together = tokens(generate(session, prompts))
        alone = [tokens(generate(session, [p]))[0] for p in prompts]
    assert together == alone
    assert together != tokens(generate(session, prompts))
