"""ChunkKV against attention maps of the library's eager implementation, chunk by chunk in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import tiny
from tests.methods.calling import attention_call, kept, library_maps
from tests.methods.driving import attached, make_session, prefill, prompt
from workers.policies.kv.chunkkv import ChunkKV


def chosen(maps: np.ndarray, budget: int, window: int, length: int) -> list[int]:
    """The window, then whole chunks by the mean of their votes, the last one cut: from attention [Hq, L, L]."""
    total = maps.shape[-1]
    votes = maps[:, -window:].sum(1).mean(0)
    free = range(total - window)
    chunks = [[i for i in free if i // length == c] for c in range(total // length + 1)]
    ranked = sorted((c for c in chunks if c), key=lambda c: -votes[c].mean())
    stays = [i for c in ranked for i in c][: budget - window]
    return sorted([*stays, *range(total - window, total)])


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize(("length", "keep"), [(10, 0.5), (6, 0.3), (1, 0.4)])
def test_the_best_chunks_stay_and_the_last_is_cut(length: int, keep: float, chunk: int | None) -> None:
    session, ids = make_session(chunk_size=chunk), prompt(50)
    with attached(session, ChunkKV(keep=keep, window=5, chunk_length=length)):
        found = kept(prefill(session, ids))
    for places, maps in zip(found, library_maps(tiny.llama_folder(), ids), strict=True):
        assert places.tolist() == [chosen(maps, round(keep * 50), 5, length)] * 2


def test_a_choice_worked_by_hand() -> None:
    """Chunks of 3 over 8 entries, the last one votes 0.02 0.1 0.03 | 0.1 0.1 0.2 | 0.05 and for itself 0.4.

    Means 0.05, 0.4 / 3 and 0.05 / 1; the chunk at the end counts without the window, and wins against the first by a hair.
    """
    votes = torch.tensor([0.02, 0.1, 0.029, 0.1, 0.1, 0.2, 0.05, 0.401])
    query = torch.zeros(1, 1, 8, 8)
    query[0, 0, -1] = votes.log()
    call = attention_call(torch.eye(8).expand(1, 1, 8, 8), query)
    for keep, expected in ((0.375, [3, 4, 7]), (0.625, [3, 4, 5, 6, 7]), (0.75, [0, 3, 4, 5, 6, 7])):
        found = ChunkKV(keep=keep, window=1, chunk_length=3).choose_like([], call)
        assert found is not None
        assert found[0, 0].tolist() == expected


def test_layers_share_the_choice_of_the_first_of_their_group() -> None:
    folder, ids = tiny.llama_folder(name="llama4", num_hidden_layers=4), prompt(50)
    runs = {}
    for reuse in (1, 2, 3):
        session = make_session(folder)
        with attached(session, ChunkKV(keep=0.3, window=5, reuse_layers=reuse)):
            prefill(session, prompt(48, seed=1))  # the choice is not taken from another prompt
            runs[reuse] = [x.tolist() for x in kept(prefill(session, ids))]
    own = runs[1]
    assert own[0] != own[1]
    assert runs[2] == [own[0], own[0], own[2], own[2]]
    assert runs[3] == [own[0], own[0], own[0], own[3]]


def test_a_layer_that_holds_other_entries_chooses_for_itself() -> None:
    call, latest = attention_call(torch.eye(8).expand(1, 1, 8, 8)), []
    policy = ChunkKV(keep=0.5, window=1, reuse_layers=2)
    policy.choose_like(latest, call)
    (first,) = latest
    call.cache.keep(torch.arange(1, 8)[None, None])
    call.layer, call.forward.cache.layers = 1, [call.cache, call.cache]
    assert policy.choose_like(latest, call) is not None
    assert latest[0] is not first
    assert latest[0].scores.shape == (1, 7)
