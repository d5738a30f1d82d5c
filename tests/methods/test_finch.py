"""FINCH against attention maps of the library's eager implementation and the paper's loop over chunks on its own cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests import tiny
from tests.methods.calling import attention_call, best, kept, kept_in, library_maps
from tests.methods.driving import attached, make_session, prefill, prompt
from tests.tiny_states import bamba_folder, falcon_h1_folder
from workers.policies.kv.finch import Finch


def scores(rows: np.ndarray) -> np.ndarray:
    """From attention [Hq, w, S] of the question: each row times the entries it sees, each column over those who see it."""
    sees = rows[0] > 0
    paid = rows.mean(0) * sees.sum(1, keepdims=True)
    return paid.sum(0) / np.maximum(sees.sum(0), 1)


def guarded(values: np.ndarray, recent: int) -> np.ndarray:
    return np.concatenate((values[: len(values) - recent], np.full(recent, np.inf)))


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("folder", [tiny.llama_folder, tiny.mistral_folder])
def test_what_the_question_attends_to_stays(folder: Callable[[], Path], chunk: int | None) -> None:
    """In Mistral's sliding windows of 16, positions that fewer queries of the question see are not punished for it."""
    session, ids = make_session(folder(), chunk_size=chunk), prompt(40)
    with attached(session, Finch(keep=0.4, window=6)):
        found = kept(prefill(session, ids))
    for places, maps in zip(found, library_maps(folder(), ids), strict=True):
        assert np.array_equal(places, [best(guarded(scores(maps[:, -6:]), 6), 16)] * len(places))


def test_scores_worked_by_hand() -> None:
    """The last but one of four entries pays 1/4, 1/2, 1/4 to the three it sees; the last one 1/4 to each of four."""
    query = torch.zeros(1, 1, 4, 4)
    query[0, 0, 2] = torch.tensor([1.0, 2, 1, 1]).log()
    call = attention_call(torch.eye(4).expand(1, 1, 4, 4), query)
    expected = [(3 / 4 + 1) / 2, (3 / 2 + 1) / 2, (3 / 4 + 1) / 2, 1.0]
    np.testing.assert_allclose(Finch(window=2).scores(call)[0].numpy(), expected, rtol=1e-6)
    expected = [1 / 4, 3 / 8, 1 / 4, 1 / 4]
    np.testing.assert_allclose(Finch(window=2, normalize=False).scores(call)[0].numpy(), expected, rtol=1e-6)


def paper(ids: Sequence[int], chunk: int, window: int, keep: float) -> Iterator[list[np.ndarray]]:
    """The paper's loop on the library's cache: read a chunk, ask, keep the best; after each what stays, per layer."""
    folder, length, cache = tiny.llama_folder(), len(ids), DynamicCache()
    places = [np.arange(0) for _ in range(2)]
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        positions = torch.arange(start, stop)[None]
        read = library_maps(folder, ids[start:stop], past_key_values=cache, position_ids=positions)
        begun = max(0, stop - (length - window))
        behind = ids[max(stop, length - window) :]
        asked: list[np.ndarray] = []
        if behind:
            other, positions = DynamicCache(), torch.arange(stop, stop + len(behind))[None]
            for i, layer in enumerate(cache.layers):
                other.update(layer.keys.clone(), layer.values.clone(), i)
            asked = library_maps(folder, behind, past_key_values=other, position_ids=positions)
        for i, layer in enumerate(cache.layers):
            there = np.concatenate((places[i], np.arange(start, stop)))
            rows = read[i][:, read[i].shape[1] - begun :]
            if behind:
                rows = np.concatenate((np.pad(rows, ((0, 0), (0, 0), (0, len(behind)))), asked[i]), 1)
            index = best(guarded(scores(rows)[: len(there)], begun), max(begun, round(keep * stop)))
            places[i] = there[index]
            layer.keys, layer.values = layer.keys[:, :, index], layer.values[:, :, index]
        yield list(places)


@pytest.mark.parametrize(("length", "chunks"), [(38, 4), (36, 3)])
def test_between_chunks_the_question_is_asked_as_in_the_paper(length: int, chunks: int) -> None:
    """Chunks end at 10, 20, 30. Of 36 tokens the third ends within the question of 8, whose rest is asked."""
    session, ids, found = make_session(chunk_size=10), prompt(length), []
    with (
        attached(session, Finch(keep=0.4, window=8, between_chunks=True)),
        session.hooked(session.after_chunk, lambda end: found.append(kept_in(end.forward.cache))),
    ):
        prefill(session, ids)
    assert len(found) == 4
    for got, expected in list(zip(found, paper(ids, 10, 8, 0.4), strict=True))[:chunks]:
        assert [x.tolist() for x in got] == [[x.tolist()] * 2 for x in expected]
    assert session.acted["finch"] == 2 * (length - round(0.4 * length))


@pytest.mark.parametrize("folder", [tiny.llama_folder, bamba_folder, falcon_h1_folder])
def test_a_question_that_evicts_nothing_leaves_no_trace(folder: Callable[[], Path]) -> None:
    """Also in layers with a running state, which cannot be taken back."""
    session, prompts = make_session(folder(), chunk_size=9), [prompt(30), prompt(11, seed=1)]
    plain = prefill(session, *prompts)
    with attached(session, Finch(keep=0.99, window=4, between_chunks=True)):
        asked = prefill(session, *prompts)
    assert torch.equal(asked.logits, plain.logits)
    for a, b in zip(asked.cache.layers, plain.cache.layers, strict=True):
        assert (a.seen, a.stored, a.nbytes()) == (b.seen, b.stored, b.nbytes())
        if b.keeps_kv:
            assert torch.equal(a.held().keys, b.held().keys)
