"""SpecKV against attention maps of the library over prompt and look-ahead, and against the truth that a perfect draft foresees."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from studio_state.errors import WorkloadError
from tests import tiny
from tests.methods.driving import attached, forced, generate, make_session, prefill, prompt, tokens
from tests.methods.foreseen import foreseen, likeliest, maps
from workers.families.batches import State
from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.cache import StudioCache
from workers.mechanisms.drafting import DraftModel
from workers.mechanisms.eviction import most_attention
from workers.mechanisms.linear import held_bytes
from workers.mechanisms.look_ahead import Waiting, best_votes
from workers.mechanisms.weight_policy import weight_metrics
from workers.policies.kv.speckv import SpecKV

PROMPT = prompt(60, seed=2)
OTHER = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


def kept(state: State) -> list[list[list[int]]]:
    """Per layer, per head."""
    return [layer.group.logical(1, torch.device("cpu"))[0].tolist() for layer in state.cache.layers]


def ahead_of(knobs: dict[str, Any]) -> list[int]:
    """What the draft writes, by the library: after the model's own first token, or alone."""
    count = knobs["look_ahead"]
    layers = 0 if "draft_model" in knobs else round(2 * knobs.get("depth", 0.5))
    folder = tiny.llama_folder("llama-other", **OTHER) if knobs.get("draft_model") == "other" else None
    first = likeliest(PROMPT, min(count, 1)) if knobs.get("first") != "draft" else []
    return first + likeliest([*PROMPT, *first], count - len(first), folder, layers)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize(
    "knobs",
    [
        {"look_ahead": 0},
        {"look_ahead": 6, "depth": 0.5},
        {"look_ahead": 6, "depth": 0.5, "first": "draft"},
        {"look_ahead": 6, "depth": 1.0},
        {"look_ahead": 6, "draft_model": "same"},
        {"look_ahead": 6, "draft_model": "other"},
        {"look_ahead": 6, "draft_model": "other", "first": "draft"},
    ],
    ids=str,
)
def test_the_best_votes_of_window_and_look_ahead_stay(knobs: dict[str, Any], chunk: int | None) -> None:
    """A draft that is the model itself foresees the greedy answer, so that what stays is all of its oracle's choice."""
    session, ahead = make_session(chunk_size=chunk), ahead_of(knobs)
    if "draft_model" in knobs:
        same, other = tiny.llama_folder(), tiny.llama_folder("llama-other", **OTHER)
        knobs = {**knobs, "draft_model": str(other if knobs["draft_model"] == "other" else same)}
    with attached(session, SpecKV(keep=0.4, window=8, kernel=3, **knobs)):
        state = prefill(session, PROMPT)
    assert kept(state) == [foreseen(m, 2, 60, 8, 24, 3) for m in maps([*PROMPT, *ahead])]
    assert session.acted["speckv"] == 2 * 36
    if knobs.get("depth") == 1.0 or knobs.get("draft_model") == str(tiny.llama_folder()):
        assert ahead == likeliest(PROMPT, 6)


@pytest.mark.parametrize("folder", [tiny.qwen3_folder, tiny.mistral_folder, tiny.gemma3_folder, tiny.gpt2_folder])
def test_all_layers_draft_what_the_same_model_beside_drafts(folder: Callable[[], Path]) -> None:
    session, found = make_session(folder()), []
    for knobs in ({"depth": 1.0}, {"draft_model": str(folder())}):
        with attached(session, SpecKV(keep=0.4, window=8, **knobs)):
            found.append(kept(prefill(session, PROMPT)))
    assert found[0] == found[1]


def test_nothing_of_the_look_ahead_stays() -> None:
    """Keys and values are those of a plain prefill, bit by bit, and so is the first new token."""
    session = make_session()
    plain = prefill(session, PROMPT)
    with attached(session, SpecKV(keep=0.4, window=8)):
        state = prefill(session, PROMPT)
    assert torch.equal(state.logits, plain.logits)
    assert state.next_position.tolist() == [[60]]
    for cut, whole in zip(state.cache.layers, plain.cache.layers, strict=True):
        assert (cut.seen, cut.group.store.length) == (60, 24)
        index = cut.group.logical(1, session.device)[..., None].expand(-1, -1, -1, 16)
        for a, b in zip(cut.group.store.read(), whole.group.store.read(), strict=True):
            assert torch.equal(a, b.gather(2, index))
    with attached(session, SpecKV(keep=0.6, window=8, layers="given", layer_shares="99, 1")):  # all, and what is left of 72
        state = prefill(session, PROMPT)
    assert [layer.stored for layer in state.cache.layers] == [60, 12]
    assert state.cache.nbytes() == (60 + 12) * 2 * 2 * 16 * 4


def test_a_prompt_within_the_budget_is_the_baseline() -> None:
    session, ids = make_session(), prompt(30)
    expected, scores = generate(session, [ids], new=6), forced(session, ids, PROMPT[:6])
    with attached(session, SpecKV(keep=0.1, window=32)):
        got = generate(session, [ids], new=6)
        assert torch.equal(forced(session, ids, PROMPT[:6]), scores)
    assert (tokens(got), got.counts) == (tokens(expected), expected.counts)
    assert session.acted == {}


def called(x: torch.Tensor) -> AttentionCall:
    """The attention of one layer at the end of a prompt, with these keys, values and queries."""
    cache, count = StudioCache(1), x.shape[2]
    cache.layers[0].append(x, x, None, count)
    forward = Forward(cache, "prefill", torch.arange(count)[None], ends_prefill=True, prompt_lengths=[count], seen=count)
    return AttentionCall(0, x, cache.layers[0], forward, 1.0)


def test_scores_as_worked_by_hand() -> None:
    """One KV head, six tokens, a window of two; 0 and 2 are as good as 1 but for their own votes."""
    x, votes = torch.zeros(1, 1, 6, 4), torch.tensor([[[0.1, 0.8, 0.2, 0.0, 0.9, 1.0]]])
    call = Waiting(**vars(called(x)), votes=votes)
    policy = SpecKV(keep=4 / 6, window=2, kernel=3)
    torch.testing.assert_close(policy.scores(call).float(), torch.tensor([[[0.8, 0.8, 0.8, 0.2, 0.0, 0.0]]]))
    assert policy.choose(call).tolist() == [[[1, 2, 4, 5]]]  # type: ignore[union-attr]


def test_what_follows_the_end_of_a_text_has_no_vote() -> None:
    end = tiny.tokenizer().eos_token_id
    ids = torch.tensor([[9, end, 9, end], [9, 9, 9, 9]])
    for eos, expected in (("stop", [[True, True, False, False], [True] * 4]), ("ignore", [[True] * 4] * 2)):
        with ExitStack() as stack:
            assert SpecKV().draft(make_session(eos=eos), stack).counted(ids).tolist() == expected
    call = called(torch.zeros(1, 1, 6, 4))  # equal attention to all that each query sees: 1/5 of the last but one, then 1/6
    torch.testing.assert_close(best_votes(call, call.query[:, :, -2:])[0, 0], torch.tensor([0.2] * 5 + [1 / 6]))
    for counted, expected in (([1, 1], [0.2] * 5 + [1 / 6]), ([0, 1], [1 / 6] * 6)):
        voting = torch.tensor([[0] * 4 + counted]).bool()
        torch.testing.assert_close(most_attention(call, voting, rows=4)[0, 0], torch.tensor(expected))


def test_draft_models_count_and_must_read_the_prompt() -> None:
    session, small = make_session(), tiny.llama_folder("llama-short", max_position_embeddings=40)
    policy, alone = SpecKV(keep=0.4, window=8, draft_model=str(small)), weight_metrics(session)["weight_bytes"]
    with attached(session, policy):
        model = session.built[DraftModel, str(small)].model
        assert weight_metrics(session)["weight_bytes"] == alone + held_bytes([model])
        assert kept(prefill(session, PROMPT[:40]))  # as long as its context: it says one token
        with pytest.raises(WorkloadError, match=r"has 41 tokens, but the draft .* reads at most 40; shorten the prompt or give"):
            prefill(session, PROMPT[:41])


def test_a_first_token_that_the_draft_does_not_know_is_its_own() -> None:
    """The model's vocabulary is padded: it says a token there, which the draft could not even look up."""
    session, found = make_session(tiny.llama_folder("llama-padded", vocab_size=700)), []
    ids = next(p for p in (prompt(60, seed=s) for s in range(40)) if int(prefill(session, p).logits.argmax()) >= tiny.VOCAB)
    for first in ("model", "draft"):
        with attached(session, SpecKV(keep=0.4, window=8, first=first, draft_model=str(tiny.llama_folder()))):  # type: ignore[arg-type]
            found.append(kept(prefill(session, ids)))
    assert found[0] == found[1]
