"""DivPrune against the greedy max-min algorithm in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests import tiny_vision
from tests.methods.driving import run_items, seeing_session
from tests.methods.seeing import CLOSE, FOLDERS, given, greedy, one, prefilled, visual
from workers.policies.tokens.divprune import DivPrune, most_diverse


def vectors(count: int, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def distance(a: list[float], b: list[float]) -> float:
    """Cosine distance."""
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return 1 - dot / math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))


def greedy_max_min(features: Tensor, count: int) -> list[int]:
    """Algorithm 1: the candidate whose nearest chosen one is farthest; to begin with, nearest of all others."""
    rows = features.double().tolist()
    apart = [[distance(a, b) for b in rows] for a in rows]
    chosen: list[int] = []
    for _ in range(count):
        left = [i for i in range(len(rows)) if i not in chosen]
        gap = {i: min(apart[i][j] for j in (chosen or range(len(rows))) if j != i) for i in left}
        chosen.append(max(left, key=lambda i: gap[i]))
    return chosen


@pytest.mark.parametrize("seed", range(6))
def test_every_pick_is_the_greedy_one(seed: int) -> None:
    features = vectors(12, seed=seed)
    order = greedy_max_min(features, 12)
    for count in range(1, 13):
        assert most_diverse(features, count).tolist() == order[:count]


def test_the_first_is_the_loneliest() -> None:
    """Angles 0, 10, 30, 70 and 75 degrees: the nearest neighbours are 10, 10, 20, 5 and 5 away; then 75, then 0."""
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 30.0, 70.0, 75.0]))
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor(
        [[3.0], [0.1], [1.0], [7.0], [2.0]]
    )  # lengths do not count
    assert most_diverse(features, 3).tolist() == [2, 4, 0]


def test_a_double_comes_last() -> None:
    """As long as a different vector is left, no copy is taken."""
    different = vectors(6, seed=3)
    features = torch.cat([different, different[:3] * 2.5, different[1:2]])  # 6, 7, 8 and 9 are copies of 0, 1, 2 and 1
    origin = [0, 1, 2, 3, 4, 5, 0, 1, 2, 1]
    for count in range(1, 7):
        assert len({origin[i] for i in most_diverse(features, count).tolist()}) == count
    assert sorted(most_diverse(features, 10).tolist()) == list(range(10))
    assert sorted(most_diverse(torch.ones(5, 3), 5).tolist()) == list(range(5))


def test_the_smallest_distance_is_not_beaten_by_chance() -> None:
    """Greedy is at least half as good as the best set; so a random set is not much better."""
    features = vectors(30, 8)

    def spread(index: Tensor) -> float:
        unit = torch.nn.functional.normalize(features[index], dim=1)
        return float((1 - unit @ unit.T).masked_fill(torch.eye(len(index), dtype=torch.bool), 9).min())

    ours = spread(most_diverse(features, 6))
    draws = [spread(torch.randperm(30, generator=torch.Generator().manual_seed(i))[:6]) for i in range(200)]
    assert ours > sorted(draws)[180]


def test_line_breaks_stay_and_do_not_count() -> None:
    features = vectors(8, seed=1)
    tokens = visual(features, (2, 3), rows=[0, 1, 2, -1, 3, 4, 5, -1])
    patches = [0, 1, 2, 4, 5, 6]
    chosen = sorted(patches[i] for i in greedy_max_min(features[patches], 3))
    assert DivPrune().choose(tokens, 0.5).index.tolist() == sorted([*chosen, 3, 7])
    assert DivPrune().choose(tokens, 0.01).index.tolist() == sorted([patches[greedy_max_min(features[patches], 1)[0]], 3, 7])
    assert DivPrune().choose(tokens, 1.0).index.tolist() == list(range(8))


@pytest.mark.parametrize("name", FOLDERS)
def test_the_tokens_compared_are_those_that_would_enter(name: str) -> None:
    folder = FOLDERS[name]()
    session, item = seeing_session(folder), one(64, 64)
    with DivPrune(keep=0.3).attach(session):
        trace = run_items(session, [item], 1)
        state = prefilled(session, item)
    truth, rows = given(folder, item), trace.images[0].layout.rows
    patches = [t for t, r in enumerate(rows) if r >= 0]
    chosen = {patches[i] for i in greedy_max_min(truth.embeds[truth.places[patches]], round(0.3 * len(patches)))}
    kept = [t for t, r in enumerate(rows) if t in chosen or r < 0]
    assert trace.seen[0].entered == kept
    if name != "qwen2_5_vl":  # whose positions are a matter of the mechanism
        torch.testing.assert_close(state.logits[0], greedy(truth.without(kept), 1)[0], **CLOSE)


def test_levels_tell_what_every_share_keeps() -> None:
    """Greedy choices are nested."""
    session = seeing_session(tiny_vision.llava_folder())
    with DivPrune(keep=0.35).attach(session):
        level = run_items(session, [one()], 1).seen[0].rank()
    for keep in (0.05, 0.35, 0.6, 1.0):
        with DivPrune(keep=keep).attach(session):
            prefilled(session, one())
        assert [t for t in range(64) if level[t] <= keep] == session.seen[0].entered


def test_neutral_changes_nothing() -> None:
    session = seeing_session(tiny_vision.llava_next_folder())
    expected = prefilled(session, one()).logits
    with DivPrune(keep=1.0).attach(session):
        assert torch.equal(prefilled(session, one()).logits, expected)
    assert "divprune" not in session.acted
