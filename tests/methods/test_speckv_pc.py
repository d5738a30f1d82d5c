"""SpecKV-PC: the two cuts one after the other, as the library's attention maps have them, with one run of the draft."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.methods.driving import attached, make_session, prefill, prompt
from tests.methods.foreseen import foreseen, likeliest, maps, noticed, to_keep
from workers.families.batches import State
from workers.mechanisms.drafting import DraftModel
from workers.policies.kv.speckv import SpecKV
from workers.policies.kv.speckv_pc import SpecKVPC
from workers.policies.tokens.specpc import SpecPC

PROMPT = prompt(100, seed=6)
DRAFT = {"draft_model": str(tiny.llama_folder())}


def kept(state: State) -> list[list[list[int]]]:
    """Per layer, per head, as places in the prompt that the model read."""
    return [layer.group.logical(1, torch.device("cpu"))[0].tolist() for layer in state.cache.layers]


@pytest.mark.parametrize("chunk", [None, 9])
def test_both_cuts_follow_from_one_run_of_the_draft(chunk: int | None) -> None:
    session, ahead = make_session(chunk_size=chunk), likeliest(PROMPT, 5)
    places = to_keep(noticed(maps([*PROMPT, *ahead[:4]])[1:], 100, 8), budget=60, window=8, kernel=6)
    short = [PROMPT[i] for i in places]
    expected = [foreseen(m, 2, 60, 8, 36, 3) for m in maps([*short, *ahead])]
    read: list[int] = []
    with attached(session, SpecKVPC(keep=0.36, window=8, look_ahead=5, kernel=3, prompt_kernel=6, **DRAFT)):
        embedding = session.built[DraftModel, DRAFT["draft_model"]].model.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
        state = prefill(session, PROMPT)
        handle.remove()
    assert state.origin == [places]
    assert kept(state) == expected
    assert sum(read) == 100 + 4  # the prompt once, and all of the look-ahead but its newest token
    assert session.acted["speckv-pc"] == 40 + 2 * 24


def test_its_ends_are_the_two_methods_alone() -> None:
    session, shared = make_session(), {"keep": 0.4, "window": 8, "look_ahead": 5, **DRAFT}
    found = []
    for policy in (SpecKVPC(early=0.0, **shared), SpecKV(**shared), SpecKVPC(early=1.0, **shared), SpecPC(**shared)):
        with attached(session, policy):
            state = prefill(session, PROMPT)
        found.append((state.origin, kept(state)))
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[0] != found[2]


def test_while_answering_the_prompt_is_whole() -> None:
    session = make_session()
    with attached(session, SpecKVPC(keep=0.4, when="decode")):
        assert prefill(session, PROMPT).cache.stored() == 100
    with attached(session, SpecKVPC(keep=0.1, window=128)):  # a budget that the window alone is over
        assert prefill(session, PROMPT).cache.stored() == 100
    assert session.acted == {}
