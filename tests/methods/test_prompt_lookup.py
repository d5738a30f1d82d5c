"""Prompt lookup: the same tokens as plain decoding in fewer passes, and a cache that shows no trace of drafts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from studio_state.experiment import Sampling
from tests.methods.driving import generate, make_session, prefill, prompt, repetitive_prompt, tokens
from workers.families.llm import Generation, one_token_a_step
from workers.mechanisms.sampling import Sampler
from workers.mechanisms.speculation import lookup, speculating, verify
from workers.policies.decode.prompt_lookup import PromptLookup
from workers.workloads.base import Item

SAMPLED = Sampling(temperature=0.7, top_k=20)


def test_lookup_by_hand() -> None:
    assert lookup([1, 2, 3, 4, 9, 1, 2], longest=2, count=3) == [3, 4, 9]
    assert lookup([5, 1, 7, 1, 8, 1], longest=3, count=2) == [8, 1]  # no longer run repeats: the latest single token
    assert lookup([1, 2, 3, 8, 2, 3, 7, 1, 2, 3], longest=3, count=2) == [8, 2]  # three beat a nearer two
    assert lookup([1, 2, 3], longest=3, count=5) == []
    assert lookup([4], longest=3, count=5) == []
    assert lookup([6, 6], longest=3, count=5) == [6]


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("ids", [repetitive_prompt(60), prompt(60)], ids=["repetitive", "random"])
@pytest.mark.parametrize("new", [1, 2, 40])
def test_the_same_tokens_as_plain_decoding(sampling: Sampling, ids: list[int], new: int) -> None:
    session = make_session(sampling=sampling, seed=5)
    expected = generate(session, [ids], new=new)
    with PromptLookup(draft=6).attach(session):
        got = generate(session, [ids], new=new)
    assert tokens(got) == tokens(expected)
    assert sum(len(s.new[0]) for s in got.steps) == new
    assert got.counts["kv_bytes"] == expected.counts["kv_bytes"]


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_perfect_drafts_divide_the_passes(sampling: Sampling) -> None:
    """Drafting what plain decoding said: every draft is accepted, one pass brings five tokens."""
    session, ids = make_session(sampling=sampling), prompt(40)
    expected = tokens(generate(session, [ids], new=31))[0]

    def oracle(history: Sequence[int]) -> list[int]:
        return expected[len(history) - 40 :][:4]

    with speculating(session, "oracle", oracle):
        trace = generate(session, [ids], new=31)
    assert tokens(trace)[0] == expected
    assert trace.counts["forward_passes"] == 6  # 30 tokens after the first
    assert trace.counts["accepted_tokens"] == trace.counts["drafted_tokens"] == 24


def test_wrong_drafts_cost_nothing_but_width() -> None:
    session, ids = make_session(), prompt(40)
    expected = tokens(generate(session, [ids], new=12))[0]
    wrong = [(t + 1) % 512 for t in expected]
    with speculating(session, "oracle", lambda history: wrong[len(history) - 40 :][:4]):
        trace = generate(session, [ids], new=12)
    assert tokens(trace)[0] == expected
    assert trace.counts["forward_passes"] == 11
    assert trace.counts["accepted_tokens"] == 0
    assert trace.counts["drafted_tokens"] == 4 * 7 + 3 + 2 + 1  # never beyond the limit


def test_cache_and_state_after_a_rejection_equal_plain_decoding() -> None:
    session, ids = make_session(), prompt(40)
    with torch.inference_mode():
        plain, drafted = prefill(session, ids), prefill(session, ids)
        first = plain.logits.argmax(-1)
        run = Generation(session.family, None, plain, Sampler(Sampling(), 0, session.device), first, 9)
        steps = one_token_a_step(session, run)
        truth = [next(steps)[0][0] for _ in range(3)]
        run = Generation(session.family, None, drafted, Sampler(Sampling(), 0, session.device), first, 9)
        got = verify(session, run, int(first[0]), [truth[0], truth[1], (truth[2] + 1) % 512, 7])
    assert got == truth
    assert drafted.cache.seen == plain.cache.seen == 43
    assert torch.equal(drafted.next_position, plain.next_position)
    torch.testing.assert_close(drafted.logits, plain.logits, rtol=1e-5, atol=1e-5)
    for a, b in zip(drafted.cache.layers, plain.cache.layers, strict=True):
        for x, y in zip(a.group.store.read(), b.group.store.read(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_the_end_token_ends_the_text() -> None:
    """A draft that runs past the end of the text is cut there, as in plain decoding."""
    session, ids = make_session(), repetitive_prompt(60)
    plain = tokens(generate(session, [ids], new=20))[0]
    ends = plain.index(plain[7]) + 1
    before, session.model.generation_config.eos_token_id = session.model.generation_config.eos_token_id, plain[7]
    try:
        with PromptLookup().attach(session):
            trace = session.family.begin(session, [Item(id="0", prompt_ids=tuple(ids), max_new_tokens=20)])
            for _ in session.family.run(session, trace):
                pass
    finally:
        session.model.generation_config.eos_token_id = before
    assert trace.results[0].token_ids == plain[:ends]
