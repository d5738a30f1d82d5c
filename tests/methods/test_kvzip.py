"""KVzip against the library's eager model on prompt, request and prompt again in one piece."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from studio_state.errors import WorkloadError
from tests import tiny
from tests.methods.driving import attached, generate, library_model, make_session, prefill, prompt
from tests.methods.test_budgets import positions
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.reconstruction import FIRST, NEXT, OPEN, Request
from workers.policies.kv.kvzip import ASKED, KVzip


def requests(ids: list[int], length: int) -> list[list[int]]:
    """What is read behind the prompt, one list a pass."""
    first, following, opening = (tiny.tokenizer().encode(text, add_special_tokens=False) for text in (FIRST, NEXT, OPEN))
    found = [first + opening + ids[:length]]
    for at in range(length, len(ids), length):
        found.append(following + ids[at - 8 : at] + opening + ids[at : at + length])
    return found


def library_scores(folder: Path, ids: list[int], length: int) -> list[np.ndarray]:
    """Per layer the largest attention [H, L] that any token behind the prompt pays to each of its entries."""
    model, n, best = library_model(folder, "eager"), len(ids), None
    for request in requests(ids, length):
        with torch.inference_mode():
            maps = model(input_ids=torch.tensor([ids + request]), output_attentions=True).attentions
        scores = np.array([m[0, :, n:, :n].numpy().max(1).reshape(2, -1, n).max(1) for m in maps])
        best = scores if best is None else np.maximum(best, scores)
    assert best is not None
    return list(best)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("length", [2048, 15])
@pytest.mark.parametrize("folder", [tiny.llama_folder, tiny.qwen3_folder])
def test_what_repeating_asks_for_stays(folder: Callable[[], Path], length: int, chunk: int | None) -> None:
    session, ids = make_session(folder(), chunk_size=chunk), prompt(36)
    plain = prefill(session, ids)
    with attached(session, KVzip(keep=0.5, chunk_length=length, sinks=2)):
        state = prefill(session, ids)
    assert session.counts["forward_passes"] == len(requests(ids, length)) == (1 if length > 36 else 3)
    for layer, whole, scores in zip(range(2), plain.cache.layers, library_scores(folder(), ids, length), strict=True):
        ranked = scores.copy()
        ranked[:, :2] = 2.0  # sinks
        chosen = np.argsort(-ranked.ravel())[: 2 * 18]
        expected = [sorted(int(i % 36) for i in chosen if i // 36 == head) for head in range(2)]
        assert positions(state)[layer] == expected
        for head, group in enumerate(state.cache.layers[layer].groups):  # their entries are those of the prompt
            np.testing.assert_allclose(group.tracked[ASKED][0, 0].numpy(), scores[head, expected[head]], rtol=1e-4)
            for got, want in zip(group.store.read(), whole.group.store.read(), strict=True):
                torch.testing.assert_close(got[0, 0], want[0, head, expected[head]])


def test_nothing_of_the_second_reading_stays() -> None:
    """Where all scores are asked for and none is evicted, the cache is the plain one, to the byte."""
    session, prompts = make_session(), (prompt(30), prompt(19, seed=1))
    plain = prefill(session, *prompts)
    with attached(session, KVzip(keep=0.4, when="decode", chunk_length=8)):
        state = prefill(session, *prompts)
    assert (state.cache.nbytes(), state.cache.seen, state.cache.stored()) == (plain.cache.nbytes(), 30, 30)
    assert torch.equal(state.next_position, plain.next_position)
    for got, want in zip(state.cache.layers, plain.cache.layers, strict=True):
        assert torch.equal(got.group.positions, want.group.positions)
        for a, b in zip(got.group.store.read(), want.group.store.read(), strict=True):
            assert torch.equal(a, b)
        assert got.group.tracked[ASKED][1, :, :11].eq(0).all()  # padding is never asked for


def test_extra_passes_are_counted_and_lie_in_the_prefill() -> None:
    session, ids = make_session(), prompt(30)
    plain, order = generate(session, [ids], new=4), []

    def note(call: AttentionCall) -> None:
        order.append((call.forward.phase, call.layer))

    with attached(session, KVzip(chunk_length=10)), session.hooked(session.observers, note):
        trace = generate(session, [ids], new=4)
    assert trace.counts["forward_passes"] == plain.counts["forward_passes"] + 3
    assert [phase for phase, layer in order if layer == 0] == ["prefill"] + ["decode"] * 3  # others do not see them
    assert trace.counts["prefill_kv_bytes"] == 15 / 30 * plain.counts["prefill_kv_bytes"]


def test_pieces_and_room_as_worked_by_hand() -> None:
    request = Request([1], [2, 3], [4])
    text = list(range(10, 30))
    assert request.pieces(text, 0, 12) == [[1, 4, *range(10, 22)], [2, 3, *range(14, 22), 4, *range(22, 30)]]
    assert request.pieces(text, 18, 12) == [[2, 3, *range(20, 28), 4, 28, 29]]
    assert request.longest == 11
    session = make_session()
    longest = Request.of(session).longest
    for context, passes in ((30 + longest + 7, 5), (30 + longest, 0)):
        session.info = session.info.model_copy(update={"context": context})
        session.counts.clear()
        with attached(session, KVzip()):
            if passes:
                prefill(session, prompt(30))
                assert session.counts["forward_passes"] == passes
            else:
                with pytest.raises(WorkloadError, match="a prompt of 30 tokens leaves no room in the context"):
                    prefill(session, prompt(30))
