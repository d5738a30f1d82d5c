"""TOVA against attention maps of the library's eager implementation, and its steps against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import tiny
from tests.methods.calling import attention_call, best, kept, library_maps
from tests.methods.driving import attached, make_session, prefill, prompt
from workers.mechanisms.attention import AttentionCall
from workers.policies.kv.tova import TOVA


@pytest.mark.parametrize("chunk", [None, 7])
def test_all_heads_keep_what_the_last_token_attends_to(chunk: int | None) -> None:
    session, ids = make_session(chunk_size=chunk), prompt(40)
    with attached(session, TOVA(keep=0.25)):
        found = kept(prefill(session, ids))
    for places, maps in zip(found, library_maps(tiny.llama_folder(), ids), strict=True):
        assert np.array_equal(places, [best(maps[:, -1].mean(0), 10)] * 2)
    assert session.acted["tova"] == 2 * 30


def test_a_choice_worked_by_hand() -> None:
    """Two heads with attention 0.1, 0.6, 0.1, 0.2 and 0.4, 0.1, 0.4, 0.1 of the last token: means 0.25, 0.35, 0.25, 0.15."""
    keys = torch.eye(4).expand(1, 2, 4, 4)
    query = torch.zeros(1, 2, 4, 4)
    query[0, :, -1] = torch.tensor([[0.1, 0.6, 0.1, 0.2], [0.4, 0.1, 0.4, 0.1]]).log()
    call = attention_call(keys, query)
    torch.testing.assert_close(TOVA().scores(call), torch.tensor([[0.25, 0.35, 0.25, 0.15]]))
    chosen = TOVA(keep=0.75).choose(call)
    assert chosen is not None
    assert chosen.tolist() == [[[0, 1, 2]] * 2]  # the newest token leaves: nothing protects it


def test_every_step_drops_what_the_newest_token_attends_to_least() -> None:
    session, expected, sizes = make_session(), {}, []

    def look(call: AttentionCall) -> None:
        query, keys = call.query[0, :, -1].double().numpy(), call.keys[0].double().numpy()
        logits = np.einsum("hd,hsd->hs", query, np.repeat(keys, 2, 0)) * call.scaling
        weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        places = call.held.places().expand(1, 2, -1)[0, 0].numpy()
        expected[call.layer] = np.delete(places, weights.mean(0).argmin())

    with attached(session, TOVA(keep=0.5)), torch.inference_mode():
        state = prefill(session, prompt(24))
        session.observers.insert(0, look)
        for token in range(5, 11):
            session.family.step(session, state, torch.tensor([[token]]))
            sizes.append(state.cache.stored())
            for layer, places in enumerate(kept(state)):
                assert np.array_equal(places, [expected[layer]] * 2)
    session.observers.remove(look)
    assert sizes == [12] * 6
