"""StreamingLLM against positions written down by hand."""

from __future__ import annotations

import pytest
import torch

from tests.methods.driving import generate, make_session, prefill, prompt, tokens
from workers.policies.kv.streamingllm import StreamingLLM


def held(state: object, row: int = 0) -> list[list[int]]:
    """Positions per layer; every head must hold the same ones."""
    out = []
    for layer in state.cache.layers:  # type: ignore[attr-defined]
        positions = layer.group.logical(len(state.lengths), torch.device("cpu"))[row]  # type: ignore[attr-defined]
        assert all(torch.equal(p, positions[0]) for p in positions)
        out.append([int(p) for p in positions[0] if p >= 0])
    return out


@pytest.mark.parametrize("chunk", [None, 7])
def test_sinks_and_window_after_the_prefill(chunk: int | None) -> None:
    session = make_session(chunk_size=chunk)
    with StreamingLLM(keep=0.3, sinks=4).attach(session):
        state = prefill(session, prompt(40))
    assert held(state) == [[0, 1, 2, 3, *range(32, 40)]] * 2  # 12 of 40
    assert state.cache.seen == 40


def test_the_window_slides_while_decoding() -> None:
    session = make_session()
    with StreamingLLM(keep=0.3, sinks=2).attach(session), torch.inference_mode():
        state = prefill(session, prompt(40))
        for token in range(5, 10):
            session.family.step(session, state, torch.tensor([[token]]))
    assert held(state) == [[0, 1, *range(35, 45)]] * 2
    assert session.acted["streamingllm"] == 2 * (28 + 5)


def test_every_spaces_the_evictions() -> None:
    session, sizes = make_session(), []
    with StreamingLLM(keep=0.5, every=4).attach(session), torch.inference_mode():
        state = prefill(session, prompt(40))
        for token in range(5, 15):
            session.family.step(session, state, torch.tensor([[token]]))
            sizes.append(state.cache.stored())
    assert sizes == [21, 22, 23, 20, 21, 22, 23, 20, 21, 22]


def test_sinks_of_a_padded_row_are_its_own_first_tokens() -> None:
    session = make_session()
    with StreamingLLM(keep=0.3, sinks=4).attach(session):
        state = prefill(session, prompt(40), prompt(25, seed=1))
    assert held(state, row=1) == [[0, 1, 2, 3, *range(21, 25)]] * 2  # 8 of its own 25, not 12 of the padded 40


def test_it_equals_a_model_that_never_saw_the_gap() -> None:
    """One decode step equals the full cache under an explicit mask: sinks and window only."""
    session, ids = make_session(), prompt(40)
    full = prefill(session, ids)
    keep = torch.tensor([0, 1, 2, 3, *range(32, 40)])
    for layer in full.cache.layers:
        layer.keep(keep.expand(1, 2, -1))
    with torch.inference_mode():
        expected = session.family.step(session, full, torch.tensor([[9]]))
        with StreamingLLM(keep=0.3, sinks=4).attach(session):
            got = session.family.step(session, prefill(session, ids), torch.tensor([[9]]))
    assert torch.equal(got, expected)


def test_a_short_prompt_keeps_its_sinks_and_one_more() -> None:
    session = make_session()
    with StreamingLLM(keep=0.01, sinks=4).attach(session):
        trace = generate(session, [prompt(20)], new=6)
        assert trace.counts["kept_prompt_tokens"] == 5
        assert len(tokens(trace)[0]) == 6
        assert generate(session, [prompt(3)], new=6).counts["kept_prompt_tokens"] == 3
