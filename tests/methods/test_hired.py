"""HiRED against attention maps made by hand, and against the library's own attention maps in a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import tiny_vision
from tests.methods.driving import run_items, seeing_session, tokens
from tests.methods.seeing import CLOSE, FOLDERS, alone, given, greedy, library, one, prefilled, visual
from workers.policies.tokens.hired import HiRED, coverage

with_cls = pytest.mark.parametrize("name", ["llava", "llava_next"])


def flat(views: int, cells: int) -> Tensor:
    """Features that tell nothing."""
    return torch.zeros(views * cells, 1)


def test_selection_by_hand() -> None:
    """12 tokens, half of them: 6, of which 3 of the whole image; both marked patches lie on the right."""
    tokens = visual(flat(3, 4), (2, 2), (1, 2))
    first = torch.tensor([[0.1, 0.4, 0.2, 0.3], [9.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 0.0]])  # only the whole image counts
    last = torch.tensor([[0.2, 0.1, 0.4, 0.3], [5.0, 6.0, 7.0, 8.0], [0.4, 0.1, 0.2, 0.3]])
    kept = HiRED(keep=0.5).select(tokens, 0.5, first, last)
    assert kept.tolist() == [0, 2, 3, 8, 10, 11]
    assert HiRED(alpha=0.5).budgets(0.5, 3, 4, first[0], (2, 2), (1, 2)) == [3, 0, 3]


def quadrant(side: int, top: bool, left: bool) -> Tensor:
    """A map that is bright in one quadrant and falls slowly elsewhere."""
    bright = torch.linspace(1.0, 0.5, side * side).view(side, side)
    rows = slice(0, side // 2) if top else slice(side // 2, side)
    columns = slice(0, side // 2) if left else slice(side // 2, side)
    bright[rows, columns] += 1.0
    return bright.flatten()


@pytest.mark.parametrize("side", [8, 24])
def test_a_bright_quadrant_gets_the_whole_budget_of_the_tiles(side: int) -> None:
    cells = side * side
    for tile, (top, left) in enumerate([(True, True), (True, False), (False, True), (False, False)]):
        first = quadrant(side, top, left)
        counts = HiRED(alpha=0.75).budgets(0.2, 5, cells, first, (side, side), (2, 2))  # a quarter of the patches is marked
        total = int(5 * cells * 0.2)
        whole = int(total * 0.75)
        assert counts == [whole, *(total - whole if t == tile else 0 for t in range(4))]


def test_strips_count_as_the_released_code_does() -> None:
    """A bright top right quadrant of a 24 x 24 map: [0, 144, 0, 0], but [72, 72, 0, 0] in the released code."""
    marked = torch.zeros(24, 24)
    marked[:12, 12:] = 1.0
    assert HiRED().marks(marked.flatten(), 4, (24, 24), (2, 2)).tolist() == [0, 144, 0, 0]
    assert HiRED(strips=True).marks(marked.flatten(), 4, (24, 24), (2, 2)).tolist() == [72, 72, 0, 0]
    first = quadrant(24, top=True, left=False)
    assert HiRED(alpha=0.75, strips=True).budgets(0.2, 5, 576, first, (24, 24), (2, 2)) == [432, 72, 72, 0, 0]
    assert HiRED(strips=True).marks(torch.ones(576), 4, (24, 24), (1, 4)).tolist() == [144] * 4


@pytest.mark.parametrize(
    ("side", "tiles"), [((8, 8), (1, 3)), ((8, 8), (3, 1)), ((5, 7), (2, 3)), ((4, 4), (3, 3)), ((6, 6), (2, 3))]
)
def test_borders_of_odd_grids_run_through_patches(side: tuple[int, int], tiles: tuple[int, int]) -> None:
    """Every patch is cut into as many pieces as there are tiles along an edge; then no border cuts a piece."""
    marked = (torch.rand(side, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    pieces = np.kron(marked.numpy(), np.ones(tiles)).reshape(tiles[0], side[0], tiles[1], side[1])
    expected = pieces.sum((1, 3)).flatten() / (tiles[0] * tiles[1])
    got = HiRED().marks(marked.flatten(), tiles[0] * tiles[1], side, tiles)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)
    assert float(got.sum()) == pytest.approx(float(marked.sum()))


def test_coverage_by_hand() -> None:
    np.testing.assert_allclose(coverage(4, 3).numpy(), [[1, 1 / 3, 0, 0], [0, 2 / 3, 2 / 3, 0], [0, 0, 1 / 3, 1]], atol=1e-6)
    assert coverage(6, 2).tolist() == [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]
    assert coverage(3, 1).tolist() == [[1, 1, 1]]


def planned(policy: HiRED, first: Tensor, views: int, tiles: tuple[int, int]) -> list[int]:
    """Budgets in plain Python, for maps that the tiles divide: marks are counted patch by patch."""
    side = round(len(first) ** 0.5)
    total = int(views * len(first) * policy.keep)
    whole = min(int(total * policy.alpha), len(first))
    rest = min(total - whole, (views - 1) * len(first))
    counts = [0] * (views - 1)
    ranked = sorted(range(len(first)), key=lambda p: -float(first[p]))
    for patch in ranked[: int(len(first) * (1 - policy.alpha))]:
        row, column = divmod(patch, side)
        counts[row * tiles[0] // side * tiles[1] + column * tiles[1] // side] += 1
    return [whole, *(min(rest * c // max(1, sum(counts)), len(first)) for c in counts)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("keep", [0.05, 0.2, 0.6, 0.97])
def test_never_more_than_the_budget_and_the_best_of_every_view(seed: int, alpha: float, keep: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    first, last = torch.rand(5, 64, generator=draw), torch.rand(5, 64, generator=draw)
    policy = HiRED(keep=keep, alpha=alpha)
    kept = policy.select(visual(flat(5, 64), (8, 8), (2, 2)), keep, first, last).tolist()
    expected = planned(policy, first[0], 5, (2, 2))
    assert len(kept) <= keep * 320
    for view, count in enumerate(expected):
        best = sorted(range(64), key=lambda c: -float(last[view, c]))[:count]
        assert [t - 64 * view for t in kept if t // 64 == view] == sorted(best)


def test_one_view_has_the_whole_budget() -> None:
    first, last = (
        torch.rand(1, 16),
        torch.tensor([[3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0, 3.0, 5.0, 8.0, 9.0, 7.0, 9.0, 3.0]]),
    )
    kept = HiRED().select(visual(flat(1, 16), (4, 4)), 0.3, first, last)
    assert kept.tolist() == [5, 11, 12, 14]  # int(4.8) of them
    assert HiRED().select(visual(flat(1, 16), (4, 4)), 0.01, first, last).tolist() == [5]
    assert HiRED().select(visual(flat(1, 16), (4, 4)), 1.0, first, last).tolist() == list(range(16))


def test_a_tiny_budget_still_keeps_one_token() -> None:
    """One token for five views: none of them gets a whole one."""
    first, last = torch.rand(5, 4), torch.rand(5, 4)
    kept = HiRED().select(visual(flat(5, 4), (2, 2), (2, 2)), 0.05, first, last)
    assert kept.tolist() == [int(last[0].argmax())]


def test_padding_is_not_kept_and_line_breaks_are() -> None:
    """Cells without a token may be chosen (as in the paper's code, which unpads afterwards); they are not made up for."""
    rows = [0, 1, 2, 3, 6, 7, -1, 10, 11, -1]  # the upper halves of both tiles are padding
    tokens = visual(torch.zeros(10, 1), (2, 2), (1, 2), rows=rows)
    first, last = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3), torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 3)
    kept = HiRED().select(tokens, 0.84, first, last)  # 10: 4 whole (int 5 capped), then 3 for each tile
    assert [rows[t] for t in kept.tolist()] == [0, 1, 2, 3, 6, -1, 10, -1]


# -- in a run ------------------------------------------------------------------------------
@with_cls
def test_a_full_budget_is_the_whole_model(name: str) -> None:
    session, item = seeing_session(FOLDERS[name]()), one(200, 64)
    logits = prefilled(session, item).logits
    expected = run_items(session, [item])
    with HiRED(keep=1.0).attach(session):
        assert torch.equal(prefilled(session, item).logits, logits)
        assert tokens(run_items(session, [item])) == tokens(expected)
    assert "hired" not in session.acted


def cls_maps(name: str, item: Any) -> list[Tensor]:
    """[P, C] of every layer, by the library's own eager attention: heads summed, the column of CLS itself left out."""
    truth, folder = given(FOLDERS[name](), item), FOLDERS[name]()
    tower = library(folder, "eager").model.vision_tower
    with torch.inference_mode():
        maps = tower(truth.inputs["pixel_values"].flatten(0, -4), output_attentions=True).attentions
    return [m[:, :, 0, 1:].sum(1) for m in maps]


@with_cls
def test_it_looks_at_cls_in_the_first_layer_and_in_that_of_the_features(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower has three layers, and its features come from hidden state -2, which the second one makes."""
    looked: list[tuple[Tensor, Tensor]] = []
    select = HiRED.select

    def spy(policy: HiRED, tokens: Any, keep: float, first: Tensor, last: Tensor) -> Tensor:
        looked.append((first, last))
        return select(policy, tokens, keep, first, last)

    monkeypatch.setattr(HiRED, "select", spy)
    session, item = seeing_session(FOLDERS[name]()), one()
    with HiRED(keep=0.2).attach(session):
        prefilled(session, item)
    maps = cls_maps(name, item)
    assert len(maps) == 3
    torch.testing.assert_close(looked[0][0], maps[0], **CLOSE)
    torch.testing.assert_close(looked[0][1], maps[1], **CLOSE)
    assert not torch.allclose(maps[1], maps[2])


@pytest.mark.parametrize(("width", "height", "tiles"), [(128, 128, (2, 2)), (200, 64, (1, 2)), (96, 128, (2, 2))])
def test_the_chosen_tokens_alone_enter(width: int, height: int, tiles: tuple[int, int]) -> None:
    session, item = seeing_session(tiny_vision.llava_next_folder()), one(width, height)
    policy = HiRED(keep=0.2)
    with policy.attach(session):
        trace = run_items(session, [item], 4)
        logits = prefilled(session, item).logits[0]
    layout = trace.images[0].layout
    assert layout.tiles == tiles
    first, _, _ = maps = cls_maps("llava_next", item)
    rows = set()
    for view, count in enumerate(planned(policy, first[0], len(first), tiles)):
        rows |= {view * 64 + c for c in sorted(range(64), key=lambda c: -float(maps[1][view, c]))[:count]}
    kept = [t for t, row in enumerate(layout.rows) if row in rows or row < 0]
    assert trace.seen[0].entered == kept
    assert session.acted["hired"] == 2 * (len(layout.rows) - len(kept))
    short = given(tiny_vision.llava_next_folder(), item).without(kept)
    expected, following = greedy(short, 4)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert tokens(trace) == [following]


def test_every_row_of_a_batch_has_its_own_map() -> None:
    """Also for the levels, which are worked out when the batch is long over."""
    session = seeing_session(tiny_vision.llava_next_folder())
    items = [one(128, 128, seed=1, id="a"), one(200, 64, seed=2, id="b")]
    with HiRED(keep=0.2).attach(session):
        together, single = run_items(session, items, 4), alone(session, items, 4)
    assert tokens(together) == [tokens(t)[0] for t in single]
    for record, other in zip(together.seen, single, strict=True):
        assert record.entered == other.seen[0].entered
        assert record.rank() == other.seen[0].rank()
    for item, record in zip(items, together.seen, strict=True):
        level = record.rank()
        for keep in (0.1, 0.5):
            with HiRED(keep=keep).attach(session):
                entered = run_items(session, [item], 1).seen[0].entered
            assert all(level[t] <= keep for t in entered)


def test_no_trace_is_left() -> None:
    session = seeing_session(tiny_vision.llava_folder())
    with HiRED().attach(session):
        assert len(session.selectors) == len(session.vision_observers) == 1
    assert not session.selectors
    assert not session.vision_observers
