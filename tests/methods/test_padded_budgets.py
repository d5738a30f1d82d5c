"""A row of a padded batch keeps exactly what its prompt keeps alone, in every evictor."""

from __future__ import annotations

import pytest
import torch

from tests.methods.driving import generate, make_session, prefill, prompt, tokens
from workers.families.llm import State
from workers.methods import Policy
from workers.policies.kv.h2o import H2O
from workers.policies.kv.knorm import KNorm
from workers.policies.kv.snapkv import SnapKV
from workers.policies.kv.streamingllm import StreamingLLM

EVICTORS = (
    SnapKV(keep=0.3, window=4),
    SnapKV(keep=0.5, window=16, kernel=1),  # a window longer than the shortest prompt
    KNorm(keep=0.3),
    KNorm(keep=0.5, recent=6),
    H2O(keep=0.3, every=3),
    StreamingLLM(keep=0.3, sinks=2),
)
PROMPTS = (prompt(40), prompt(23, seed=1), prompt(12, seed=2))


def kept(state: State, row: int) -> list[list[list[int]]]:
    """Positions that a row holds, without padding, per layer and head."""
    groups = [layer.group for layer in state.cache.layers]
    places = [g.logical(len(state.lengths), torch.device("cpu"))[row].expand(g.stop, -1) for g in groups]
    return [[[p for p in head if p >= 0] for head in layer.tolist()] for layer in places]


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("policy", EVICTORS, ids=lambda p: f"{p.card.id}-{p.keep}")
def test_each_row_keeps_what_it_keeps_alone(policy: Policy, chunk: int | None) -> None:
    session = make_session(chunk_size=chunk)
    with policy.attach(session):
        together = prefill(session, *PROMPTS)
        alone = [prefill(session, p) for p in PROMPTS]
    for row, state in enumerate(alone):
        assert kept(together, row) == kept(state, 0)
    assert len({len(kept(together, row)[0][0]) for row in range(3)}) == 3  # three lengths, three budgets


@pytest.mark.parametrize("policy", EVICTORS, ids=lambda p: f"{p.card.id}-{p.keep}")
def test_each_row_says_what_it_says_alone(policy: Policy) -> None:
    session = make_session()
    with policy.attach(session):
        together = tokens(generate(session, PROMPTS))
        alone = [tokens(generate(session, [p]))[0] for p in PROMPTS]
    assert together == alone
