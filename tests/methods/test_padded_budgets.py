"""A row of a padded batch keeps exactly what its prompt keeps alone, in every evictor."""

from __future__ import annotations

import pytest

from tests.methods.driving import generate, make_session, prefill, prompt, tokens
from workers.families.llm import State
from workers.mechanisms.evictor import Budgeted
from workers.methods import Policy, discover
from workers.policies.kv.knorm import KNorm
from workers.policies.kv.snapkv import SnapKV

SETTINGS = {"window": 4, "sinks": 2, "every": 3}  # knobs that suit short prompts, where a policy has them
EVICTORS = (
    *(
        cls(keep=0.3, **{k: v for k, v in SETTINGS.items() if k in cls.model_fields})
        for cls in discover().values()
        if issubclass(cls, Budgeted)
    ),
    SnapKV(keep=0.5, window=16, kernel=1),  # a window longer than the shortest prompt
    KNorm(keep=0.5, recent=6),
)
PROMPTS = (prompt(40), prompt(23, seed=1), prompt(12, seed=2))


def kept(state: State, row: int) -> list[list[list[int]]]:
    """Positions that a row holds, without padding, per layer and head."""
    places = [layer.held().places().expand(len(state.lengths), layer.heads, -1)[row] for layer in state.cache.layers]
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
    assert len({sum(map(len, kept(together, row)[0])) for row in range(3)}) == 3  # three lengths, three budgets


@pytest.mark.parametrize("policy", EVICTORS, ids=lambda p: f"{p.card.id}-{p.keep}")
def test_each_row_says_what_it_says_alone(policy: Policy) -> None:
    session = make_session()
    with policy.attach(session):
        together = tokens(generate(session, PROMPTS))
        alone = [tokens(generate(session, [p]))[0] for p in PROMPTS]
    assert together == alone
