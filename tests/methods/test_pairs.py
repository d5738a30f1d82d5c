"""Every legal pair of policies for language models really runs together and both of them act."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from studio_state.pipeline import parse_pipeline
from studio_state.problems import pipeline_problems
from tests.methods.driving import attached, folder_for, forced, generate, info_of, make_session, prompt, repetitive_prompt, tokens
from tests.methods.test_stacks import LEGAL
from workers.methods import catalogue, discover, effective

CATALOG = catalogue()
PAIRS = [
    f"{a}+{b}"
    for a, b in combinations(discover(), 2)
    if not pipeline_problems(parse_pipeline(f"{a}+{b}"), CATALOG, info_of(folder_for(CATALOG.by_id[a], CATALOG.by_id[b])))
]
STACKS = [text for text in LEGAL if text.count("+") > 1]
PROMPT = repetitive_prompt(224)  # long enough that half of it still fills packed groups


@pytest.mark.parametrize("text", [*PAIRS, *STACKS])
def test_runs_and_all_act(text: str) -> None:
    policies = effective(parse_pipeline(text))
    session = make_session(folder_for(*(p.card for p in policies)))
    with attached(session, *policies):
        trace = generate(session, [PROMPT], new=12)
        logits = forced(session, PROMPT, prompt(6, seed=3))
    assert len(tokens(trace)[0]) == 12
    assert torch.isfinite(logits).all()
    for policy in policies:
        if policy.card.id != "prompt-lookup":  # it guesses only where the text repeats itself
            assert session.acted.get(policy.card.id, 0) > 0, policy.card.id
    after = generate(session, [PROMPT], new=3)
    assert after.counts["prefill_kv_bytes"] == len(PROMPT) * 2 * 2 * 2 * 16 * 4


def test_lean_decode_changes_no_stack() -> None:
    """The same tokens with and without, whatever else stands in the pipeline."""
    for text in (
        "snapkv:keep=0.4",
        "snapkv:keep=0.4+kivi:bits=8,group_size=8,residual=8",
        "h2o:keep=0.4",
        "promptdistill",
        "magnitude+kivi",
    ):
        outputs = []
        for whole in (text, text + "+lean-decode"):
            session = make_session()
            with attached(session, *effective(parse_pipeline(whole))):
                outputs.append(tokens(generate(session, [PROMPT], new=12)))
        assert outputs[0] == outputs[1], text
