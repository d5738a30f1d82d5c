"""Random image tokens: repeatable, nested, and another draw for every item."""

from __future__ import annotations

from itertools import pairwise

import torch

from tests import tiny_vision
from tests.methods.driving import run_items, seeing_session, tokens
from tests.methods.seeing import CLOSE, alone, given, greedy, one, prefilled, visual
from workers.policies.tokens.random_visual import RandomVisual
from workers.session import Session
from workers.workloads.base import Item

SHARES = (0.02, 0.1, 0.25, 0.5, 0.9, 1.0)


def entered(session: Session, item: Item, keep: float) -> list[int]:
    with RandomVisual(keep=keep).attach(session):
        prefilled(session, item)
    return session.seen[0].entered


def test_the_same_seed_and_item_draw_the_same() -> None:
    folder = tiny_vision.llava_folder()
    draws = [entered(seeing_session(folder), one(id="a"), 0.25) for _ in range(2)]
    assert draws[0] == draws[1]
    assert len(draws[0]) == 16
    others = [entered(seeing_session(folder, seed=1), one(id="a"), 0.25), entered(seeing_session(folder), one(id="b"), 0.25)]
    assert others[0] != draws[0] != others[1] != others[0]


def test_fewer_tokens_are_among_more() -> None:
    session = seeing_session(tiny_vision.llava_folder())
    chosen = [entered(session, one(), keep) for keep in SHARES]
    assert [len(c) for c in chosen] == [max(1, round(keep * 64)) for keep in SHARES]
    assert all(set(a) < set(b) for a, b in pairwise(chosen))
    assert chosen[-1] == list(range(64))


def test_every_token_is_drawn_as_often() -> None:
    """Of 2000 seeds a quarter each: within five standard deviations."""
    counts = torch.zeros(12)
    for seed in range(2000):
        counts[RandomVisual().choose(visual(torch.zeros(12, 1), (3, 4), seed=seed), 0.25).index] += 1
    assert counts.sum() == 6000
    assert (counts - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_line_breaks_stay_and_do_not_count() -> None:
    session = seeing_session(tiny_vision.llava_next_folder())
    with RandomVisual(keep=0.2).attach(session):
        trace = run_items(session, [one()], 1)
    rows = trace.images[0].layout.rows
    kept = [rows[t] for t in trace.seen[0].entered]
    assert kept.count(-1) == rows.count(-1) == 16
    assert sum(r >= 0 for r in kept) == round(0.2 * 320)


def test_rows_of_a_batch_draw_for_themselves() -> None:
    session = seeing_session(tiny_vision.llava_folder())
    items = [one(id=i) for i in "ab"]
    with RandomVisual(keep=0.2).attach(session):
        together, single = run_items(session, items, 4), alone(session, items, 4)
    assert [r.entered for r in together.seen] == [t.seen[0].entered for t in single]
    assert together.seen[0].entered != together.seen[1].entered
    assert tokens(together) == [tokens(t)[0] for t in single]
    assert [r.rank() for r in together.seen] == [t.seen[0].rank() for t in single]


def test_levels_tell_what_every_share_keeps() -> None:
    session = seeing_session(tiny_vision.llava_folder())
    with RandomVisual(keep=0.35).attach(session):
        level = run_items(session, [one()], 1).seen[0].rank()
    for keep in (0.05, 0.35, 0.6, 1.0):
        assert [t for t in range(64) if level[t] <= keep] == entered(session, one(), keep)


def test_the_rest_is_a_shorter_prompt() -> None:
    folder = tiny_vision.idefics3_folder()
    session = seeing_session(folder)
    with RandomVisual(keep=0.2).attach(session):
        state = prefilled(session, one())
    short = given(folder, one()).without(session.seen[0].entered)
    torch.testing.assert_close(state.logits[0], greedy(short, 1)[0], **CLOSE)


def test_neutral_changes_nothing() -> None:
    session = seeing_session(tiny_vision.llava_folder())
    expected = prefilled(session, one()).logits
    with RandomVisual(keep=1.0).attach(session):
        assert torch.equal(prefilled(session, one()).logits, expected)
    assert "random-visual" not in session.acted
