"""Every legal pair of policies for language models really runs together and both of them act."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch

from studio_state.catalog import Card
from studio_state.pipeline import Pipeline, parse_pipeline
from studio_state.problems import pipeline_problems
from tests.methods.calling import kept
from tests.methods.driving import (
    attached,
    folder_for,
    forced,
    generate,
    info_of,
    make_session,
    prefill,
    prompt,
    repetitive_prompt,
    tokens,
)
from tests.methods.test_stacks import LEGAL
from tests.sampling import sampled
from workers.methods import catalogue, discover, effective

CATALOG = catalogue()
TURNED = (  # at these knobs a policy does something else to a resource than at its defaults
    "promptdistill:truncate=true",
    "promptdistill:truncate=true,stages=2,truncate_stages=1",
    "cam:when=prefill",
    "look-m:merge=none",
    "look-m:when=both,every=4",
    "streamingllm:layers=pyramid,slope=2",
    "innovation-cache:layers=pyramid,slope=2",
    "fp8:activations=fp8",
    "quarot:activation_bits=16",
)


def policy_of(text: str) -> Card:
    return CATALOG.by_id[text.partition(":")[0]]


def legal(a: str, b: str) -> bool:
    folder = folder_for(policy_of(a), policy_of(b))
    return policy_of(a) != policy_of(b) and not pipeline_problems(parse_pipeline(f"{a}+{b}"), CATALOG, info_of(folder))


PAIRS = [f"{a}+{b}" for a, b in combinations(discover(), 2) if legal(a, b)]
TURNED_PAIRS = [f"{a}+{b}" for a, b in product(TURNED, discover()) if legal(a, b)]
STACKS = [text for text in LEGAL if "+" in text and text not in {*PAIRS, *TURNED_PAIRS}]
PROMPT = repetitive_prompt(224)  # long enough that half of it still fills packed groups


def uses_of(text: str, **knobs: Any) -> tuple[str, frozenset[tuple[str, str]]]:
    """What a policy does to resources at the knobs of the text, or at these."""
    (step,) = parse_pipeline(text).steps
    return step.policy, frozenset((u.resource, u.mode) for u in policy_of(text).uses({**step.knobs, **knobs}))


def test_every_set_of_resources_that_a_policy_can_have_is_paired() -> None:
    paired = {uses_of(text) for text in (*discover(), *TURNED)}
    for name in discover():
        matter = {k: set() for use in policy_of(name).resources for k in use.when}
        for use in policy_of(name).resources:
            for knob, values in use.when.items():
                matter[knob] |= {*values, policy_of(name).defaults()[knob]}
        for values in product(*matter.values()):
            assert uses_of(name, **dict(zip(matter, values, strict=True))) in paired, (name, values)


@pytest.mark.parametrize("text", sampled([*PAIRS, *TURNED_PAIRS, *STACKS], 16))
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


@pytest.mark.parametrize(
    ("text", "left"),
    [  # of 224 tokens: what each of the first two layers' heads holds at the end of the prompt
        ("gemfilter+snapkv", 56),  # half of the 223 before the last one, rounded up, and that one; half of these 113
        ("deltallm+snapkv", 112),
        ("snapkv+think", 112),
        ("h2o+gear", 112),
        ("streamingllm+minicache", 112),
        ("innovation-cache+minicache", 112),
        ("tova+kivi", 112),
        ("quest+kivi", 224),
    ],
)
def test_each_acts_on_what_the_other_left_whichever_is_written_first(text: str, left: int) -> None:
    """What is stored in another form are the positions that the evictor alone keeps."""
    first, second = parse_pipeline(text).steps
    outputs = []
    for steps in ((first, second), (second, first)):
        session = make_session()
        with attached(session, *effective(Pipeline(steps=steps))):
            state = prefill(session, PROMPT)
            outputs.append(tokens(generate(session, [PROMPT], new=12)))
        assert [layer.stored for layer in state.cache.layers] == [left] * 2
        if CATALOG.by_id[first.policy].stage == "kv" and second.policy != "snapkv":
            session = make_session()
            with attached(session, *effective(Pipeline(steps=(first,)))):
                alone = kept(prefill(session, PROMPT))
            for mine, theirs in zip(kept(state), alone, strict=True):
                np.testing.assert_array_equal(mine, theirs)
    assert outputs[0] == outputs[1]


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
