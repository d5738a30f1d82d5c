"""SpecPC against attention maps of the library's model as the draft, and against a run on the short prompt itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.methods.driving import attached, generate, make_session, prefill, prompt, tokens
from tests.methods.foreseen import likeliest, maps, noticed, to_keep
from workers.families.batches import make_batch
from workers.mechanisms.draft_scores import most_noticed, rising, widened
from workers.policies.tokens.specpc import SpecPC

PROMPT = prompt(90, seed=4)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize(
    ("knobs", "layers", "ahead"),
    [
        ({"depth": 0.5}, [0], 0),
        ({"depth": 1.0}, [1], 0),
        ({"depth": 1.0, "start": 0.0}, [0, 1], 0),
        ({"draft_model": "same", "look_ahead": 4}, [1], 3),  # the newest of four is not read
    ],
    ids=str,
)
def test_what_the_draft_looks_at_is_read(knobs: dict[str, Any], layers: list[int], ahead: int, chunk: int | None) -> None:
    session = make_session(chunk_size=chunk)
    text = [*PROMPT, *likeliest(PROMPT, ahead)]
    scores = noticed([maps(text)[i] for i in layers], 90, 8)
    expected = to_keep(scores, budget=36, window=8, kernel=5)
    if "draft_model" in knobs:
        knobs = {**knobs, "draft_model": str(tiny.llama_folder())}
    with attached(session, SpecPC(keep=0.4, window=8, kernel=5, **knobs)):
        state = prefill(session, PROMPT)
    assert state.origin == [expected]
    assert len(set(expected)) == 36
    assert expected[-8:] == list(range(82, 90))
    assert session.acted["specpc"] == 54


def test_the_model_sees_a_short_prompt_and_nothing_else() -> None:
    """Tokens, cache and distribution are those of the short prompt given by hand; the map shows where its tokens stood."""
    session, policy = make_session(), SpecPC(keep=0.4, window=8)
    with attached(session, policy):
        state, got = prefill(session, PROMPT), generate(session, [PROMPT], new=8)
    [places] = state.origin
    short = [PROMPT[i] for i in places]
    plain, expected = prefill(session, short), generate(session, [short], new=8)
    assert torch.equal(state.logits, plain.logits)
    assert state.next_position.tolist() == [[36]]
    assert tokens(got) == tokens(expected)
    assert got.counts == expected.counts
    assert got.kept == [[[float(i in places) for i in range(90)]] * 2]


def test_padded_rows_read_what_they_read_alone() -> None:
    session, prompts = make_session(), (PROMPT, prompt(40), prompt(12, seed=2), prompt(1))
    with attached(session, SpecPC(keep=0.4, window=16, kernel=4, look_ahead=3)):
        together = prefill(session, *prompts)
        alone = [prefill(session, p) for p in prompts]
    assert together.origin == [origin for state in alone for origin in (state.origin or [list(range(state.lengths[0]))])]
    assert together.lengths == [36, 16, 12, 1]


def test_a_prompt_within_the_budget_is_handed_on() -> None:
    session = make_session()
    batch = make_batch([PROMPT[:30], PROMPT[:20]], 0, session.device)
    with attached(session, SpecPC(keep=0.1, window=32)):
        [shorten] = session.prompt_filters
        assert shorten(batch) is batch
    assert session.acted == {}


def test_a_choice_as_worked_by_hand() -> None:
    scores = torch.tensor([0.1, 0.0, 0.0, 0.9, 0.0, 0.3, 0.0, 0.0, 0.2, 0.5])
    assert widened(scores, 4).tolist() == pytest.approx([0.1, 0.9, 0.9, 0.9, 0.9, 0.3, 0.3, 0.5, 0.5, 0.5])
    # window 8, 9; then 1 with 1, 0, 2, 3; then 2 with 4; 1 to 4 are equally good, the earlier one comes first
    assert most_noticed(scores, 6, 2, 4).tolist() == [0, 1, 2, 3, 8, 9]
    assert most_noticed(scores, 7, 2, 4).tolist() == [0, 1, 2, 3, 4, 8, 9]
    assert most_noticed(scores, 4, 2, 1).tolist() == [3, 5, 8, 9]  # 9 and 3 and 5 are the best, 9 is in the window
    assert most_noticed(scores, 10, 2, 4).tolist() == list(range(10))
    np.testing.assert_allclose(rising([5, 2, 1], 3, scores.device), [[0, 0.5, 1], [0, 0, 1], [0, 0, 1]])
