"""Free Video-LLM against counts and boxes worked out by hand, and against the library fed by hand in a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from studio_state.errors import SpecError, Unavailable
from tests import tiny_vision
from tests.methods.driving import attached, clip_item, image_item, load_seeing, run_items, sample_picture, seeing_session, tokens
from tests.methods.seeing import CLOSE, given, greedy, prefilled
from workers.mechanisms.clip_scorer import load_scorer
from workers.mechanisms.frame_pooling import averaged, box_at, box_cells, box_size, evenly, widest
from workers.mechanisms.visual_tokens import Visual
from workers.policies.tokens.free_video_llm import FreeVideoLLM

PAPER = FreeVideoLLM(slow=3, middle=5, fast=4, keep=0.8, pool=2)
few = settings(max_examples=60, deadline=None)


def clip_of(frames: int, side: tuple[int, int], width: int = 3) -> Visual:
    """A clip whose every token has other features."""
    n = frames * side[0] * side[1]
    features = torch.rand(n, width, generator=torch.Generator().manual_seed(0))
    return Visual(features, torch.arange(n), torch.zeros(n, dtype=torch.long), side, (0, 0), 0, frames)


def scores_of(frames: int, side: tuple[int, int], pool: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(frames, generator=draw), torch.rand(frames, side[0], -(-side[1] // pool), generator=draw)


# -- counts --------------------------------------------------------------------------------
def test_the_papers_own_setting_has_2648_tokens() -> None:
    """3 x 231 + 5 x 231 + 50 x 16, where SlowFast-LLaVA has 10 x 288 + 800 = 3680."""
    assert PAPER.tokens(50, (24, 24)) == 2648
    assert box_size((24, 12), 0.8) == (21, 11)
    slow_fast = FreeVideoLLM(slow=0, middle=10, fast=4, keep=1.0, pool=2)
    assert slow_fast.tokens(50, (24, 24)) == 3680
    assert len(PAPER.of_clip(clip_of(50, (24, 24)), 0.8, *scores_of(50, (24, 24), 2, 0)).index) == 2648


@few
@drawn(
    frames=st.integers(2, 12),
    side=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    keep=st.floats(0.01, 1.0),
    counts=st.tuples(st.integers(0, 14), st.integers(0, 14), st.integers(0, 9)),
    pool=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_as_many_tokens_as_the_formula_says_for_any_clip(
    frames: int, side: tuple[int, int], keep: float, counts: tuple[int, int, int], pool: int, seed: int
) -> None:
    slow, middle, fast = counts
    policy = FreeVideoLLM(slow=slow, middle=middle, fast=fast, keep=keep, pool=pool)
    chosen = policy.of_clip(clip_of(frames, side), keep, *scores_of(frames, side, pool, seed))
    width = -(-side[1] // pool)
    rows, columns = max(1, round(side[0] * keep**0.5)), max(1, round(width * keep**0.5))
    by_hand = (min(slow, frames) + min(middle, frames)) * rows * columns + frames * min(fast, side[0]) * min(fast, side[1])
    assert policy.tokens(frames, side) == len(chosen.index) == by_hand
    assert chosen.features is None or len(chosen.features) == by_hand
    assert not len(chosen.index) or 0 <= int(chosen.index.min()) <= int(chosen.index.max()) < frames * side[0] * side[1]
    if chosen.group is not None:
        named = set(chosen.group.tolist()) - {-1}
        assert named <= set(chosen.index.tolist())
        assert pool > 1 or all(int(chosen.group[a]) == a for a in named)  # a token that stands for others stands for itself


# -- boxes ---------------------------------------------------------------------------------
@few
@drawn(side=st.tuples(st.integers(1, 12), st.integers(1, 12)), keep=st.floats(0.01, 1.0), seed=st.integers(0, 999))
def test_a_box_is_inside_and_of_one_size(side: tuple[int, int], keep: float, seed: int) -> None:
    scores = torch.rand(3, *side, generator=torch.Generator().manual_seed(seed))
    size = box_size(side, keep)
    cells = box_cells(box_at(scores, keep), size, side)
    for box in cells.tolist():
        assert len(set(box)) == len(box) == size[0] * size[1]
        rows, columns = {c // side[1] for c in box}, {c % side[1] for c in box}
        assert (len(rows), len(columns)) == size
        assert max(rows) - min(rows) + 1 == size[0] <= side[0]
        assert max(columns) - min(columns) + 1 == size[1] <= side[1]
        assert 0 <= min(box) <= max(box) < side[0] * side[1]


def test_a_box_by_hand() -> None:
    """4 x 4, a quarter: the best four cells are (0, 3), (1, 2), (1, 3), (3, 3); their mean is row 1.25, column 2.75.

    A box of 2 x 2 around it begins at row 0.75, column 2.25: (1, 2). In the corner it is moved inside.
    """
    scores = torch.zeros(1, 4, 4)
    for row, column in ((0, 3), (1, 2), (1, 3), (3, 3)):
        scores[0, row, column] = 1.0
    assert box_at(scores, 0.25).tolist() == [[1, 2]]
    assert box_cells(box_at(scores, 0.25), (2, 2), (4, 4)).tolist() == [[6, 7, 10, 11]]
    corner = torch.zeros(1, 4, 4)
    corner[0, 3, 3] = 1.0
    assert box_at(corner, 0.1).tolist() == [[3, 3]]  # int(1.6) cells: one, in a box of round(1.26) cells an edge
    assert box_at(corner, 1.0).tolist() == [[0, 0]]
    assert FreeVideoLLM(keep=0.25).of_image(clip_of(1, (4, 4)), 0.25, scores).index.tolist() == [6, 7, 10, 11]


def test_the_box_of_a_pooled_grid_is_a_rectangle_of_the_image() -> None:
    """A bright block of rows 14..22 and columns 6..9 in the paper's grid of 24 x 12; read as 12 x 24, as the released code
    does, the same indices would be of cells from all over the width."""
    scores = torch.zeros(1, 24, 12)
    scores[0, 14:23, 6:10] = 1.0
    keep = 36 / 288  # 36 cells; the box has round(8.49) x round(4.24) cells
    cells = box_cells(box_at(scores, keep), box_size((24, 12), keep), (24, 12))[0]
    rows, columns = (cells // 12).unique().tolist(), (cells % 12).unique().tolist()
    assert (rows, columns) == ([*range(14, 22)], [*range(6, 10)]) or (rows, columns) == ([*range(15, 23)], [*range(6, 10)])
    assert float(scores[0].flatten()[cells].mean()) == 1.0
    visual = clip_of(2, (24, 24))
    policy = FreeVideoLLM(slow=1, middle=0, fast=0, keep=keep, pool=2)
    chosen = policy.of_clip(visual, keep, torch.tensor([0.0, 1.0]), scores.expand(2, -1, -1))
    shown = chosen.index - 24 * 24
    assert set((shown // 24).tolist()) == set(rows)
    assert set((shown % 24).tolist()) == {2 * c for c in columns}
    strided = cells // 24  # rows of the image, had the grid been 12 x 24
    assert len(set((cells % 24).tolist())) > len(columns), "two rows of the grid would lie in one"
    assert len(set(strided.tolist())) < len(rows)


# -- frames --------------------------------------------------------------------------------
def test_the_best_frames_come_in_the_order_of_time() -> None:
    frames = torch.tensor([0.1, 0.9, 0.2, 0.1, 0.5, 0.0, 0.7, 0.3])
    policy = FreeVideoLLM(slow=3, middle=0, fast=0, keep=1.0)
    chosen = policy.of_clip(clip_of(8, (2, 2)), 1.0, frames, torch.zeros(8, 2, 2))
    assert (chosen.index // 4).unique_consecutive().tolist() == [1, 4, 6]
    assert chosen.index.tolist() == [4, 5, 6, 7, 16, 17, 18, 19, 24, 25, 26, 27]


@pytest.mark.parametrize(("count", "frames"), [(5, 50), (5, 8), (3, 8), (8, 8), (1, 8), (7, 50)])
def test_even_frames_are_those_of_the_papers_linspace(count: int, frames: int) -> None:
    assert evenly(count, frames).tolist() == np.linspace(0, frames, count + 1)[:-1].astype(int).tolist()
    assert evenly(frames + 3, frames).tolist() == list(range(frames))
    assert evenly(0, frames).tolist() == []


def test_the_three_pathways_by_hand() -> None:
    """4 frames of 2 x 4: one best frame, two even ones, pairs of columns pooled, and each frame averaged to 1 x 1."""
    visual = clip_of(4, (2, 4))
    cells = visual.features.view(4, 2, 4, 3).numpy()
    policy = FreeVideoLLM(slow=1, middle=2, fast=1, keep=0.5, pool=2)  # boxes of round(1.41) x round(1.41): one cell
    scores = torch.zeros(4, 2, 2)
    scores[0, 0, 1] = scores[2, 1, 0] = scores[3, 1, 1] = 1.0
    chosen = policy.of_clip(visual, 0.25, torch.tensor([0.0, 0.1, 0.0, 0.9]), scores)
    expected = [
        cells[3, 1, 2:].max(0),
        cells[0, 0, 2:].max(0),
        cells[2, 1, :2].max(0),
        *(frame.reshape(-1, 3).mean(0) for frame in cells),
    ]
    assert chosen.features is not None
    np.testing.assert_allclose(chosen.features.numpy(), expected, rtol=1e-6)
    assert chosen.index.tolist() == [3 * 8 + 6, 2, 2 * 8 + 4, 0, 8, 16, 24]
    assert chosen.group is not None
    assert chosen.group.view(4, 8).tolist() == [
        [0, 0, 2, 2, 0, 0, 0, 0],
        [8] * 8,
        [16, 16, 16, 16, 20, 20, 16, 16],
        [24, 24, 24, 24, 24, 24, 30, 30],
    ]


@pytest.mark.parametrize(("side", "columns"), [((4, 6), 2), ((3, 5), 2), ((2, 7), 3)])
def test_pooling_against_plain_loops(side: tuple[int, int], columns: int) -> None:
    cells = torch.rand(2, *side, 3, generator=torch.Generator().manual_seed(0))
    h, w = side
    wide = [[[cells[f, r, c : c + columns].amax(0) for c in range(0, w, columns)] for r in range(h)] for f in range(2)]
    assert torch.equal(widest(cells, columns), torch.stack([torch.stack([torch.stack(r) for r in f]) for f in wide]))
    parts = averaged(cells, 2)
    for i in range(2):
        for j in range(2):
            rows, across = slice(i * h // 2, -(-(i + 1) * h // 2)), slice(j * w // 2, -(-(j + 1) * w // 2))
            torch.testing.assert_close(parts[:, i, j], cells[:, rows, across].mean((1, 2)))
    assert torch.equal(averaged(cells, 9), cells)


# -- in a run ------------------------------------------------------------------------------
@pytest.mark.parametrize("slow", [4, 9])
def test_all_frames_whole_and_alone_are_the_clip_as_it_is(slow: int) -> None:
    session, item = seeing_session(tiny_vision.llava_folder()), clip_item()
    logits, expected = prefilled(session, item).logits, run_items(session, [item], 4)
    policy = FreeVideoLLM(slow=slow, middle=0, fast=0, keep=1.0)
    assert not policy.is_neutral  # it goes all the way
    with attached(session, policy):
        assert torch.equal(prefilled(session, item).logits, logits)
        assert tokens(run_items(session, [item], 4)) == tokens(expected)
    assert "free-video-llm" not in session.acted


def clip_scores(folder: Path, item: Any, inputs: dict[str, Tensor], pool: int) -> tuple[Tensor, Tensor]:
    """Cosines of the question with each frame and each cell, by the library's CLIP model alone."""
    clip, words = CLIPModel.from_pretrained(folder / "scorer"), AutoTokenizer.from_pretrained(folder / "scorer")
    pixels = inputs["pixel_values"].flatten(0, -4)
    with torch.inference_mode():
        text = clip.get_text_features(**words(item.prompt, return_tensors="pt")).pooler_output[0]
        frames = clip.get_image_features(pixels).pooler_output
        patches = clip.visual_projection(clip.vision_model(pixels).last_hidden_state[:, 1:])
    side = round(patches.shape[1] ** 0.5)
    cells = patches.unflatten(1, (side, side))
    cells = torch.stack([cells[:, :, c : c + pool].amax(2) for c in range(0, side, pool)], 2)
    return F.cosine_similarity(frames, text, dim=-1), F.cosine_similarity(cells, text, dim=-1)


@pytest.mark.parametrize("pool", [1, 2])
def test_what_enters_of_a_clip_is_what_the_library_is_given_by_hand(pool: int) -> None:
    """5 frames of 8 x 8 cells: two by the question, one even one, boxes, and all of them averaged to 2 x 2, in this order."""
    folder, item = tiny_vision.llava_folder(), clip_item(5)
    session, truth = seeing_session(folder), given(folder, item)
    policy = FreeVideoLLM(slow=2, middle=1, fast=2, keep=0.5, pool=pool)
    with attached(session, policy):
        logits, trace = prefilled(session, item).logits[0], run_items(session, [item], 4)
    frames, cells = clip_scores(folder, item, truth.inputs, pool)
    seen = truth.embeds[truth.places].view(5, 8, 8, -1)
    wide = torch.stack([seen[:, :, c : c + pool].amax(2) for c in range(0, 8, pool)], 2)
    h, w = wide.shape[1:3]
    rows, columns = round(h * 0.5**0.5), round(w * 0.5**0.5)
    parts = []
    for frame in [*sorted(sorted(range(5), key=lambda f: -float(frames[f]))[:2]), 0]:
        best = sorted(range(h * w), key=lambda c: -float(cells[frame].flatten()[c]))[: h * w // 2]
        top = sum(c // w for c in best) / len(best) - (rows - 1) / 2
        left = sum(c % w for c in best) / len(best) - (columns - 1) / 2
        r, c = (min(max(0, int(np.floor(x + 0.5))), most) for x, most in ((top, h - rows), (left, w - columns)))
        parts.append(wide[frame, r : r + rows, c : c + columns].flatten(0, 1))
    parts += [seen[f].view(2, 4, 2, 4, -1).mean((1, 3)).flatten(0, 1) for f in range(5)]
    short = truth.with_image(torch.cat(parts))
    assert len(trace.seen[0].entered) == policy.tokens(5, (8, 8)) == len(torch.cat(parts))
    expected, following = greedy(short, 4)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert tokens(trace) == [following]
    assert trace.counts["visual_tokens"] == policy.tokens(5, (8, 8))
    assert session.acted["free-video-llm"] == 2 * (5 * 64 - policy.tokens(5, (8, 8)) + 1)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_of_an_image_the_box_of_every_view_enters(name: str) -> None:
    folder = getattr(tiny_vision, f"{name}_folder")()
    item = image_item(picture=sample_picture(128, 128, seed=5))
    session, truth = seeing_session(folder), given(folder, item)
    with attached(session, FreeVideoLLM(keep=0.3)):
        logits, trace = prefilled(session, item).logits[0], run_items(session, [item], 4)
    _, scores = clip_scores(folder, item, truth.inputs, 1)
    corners, size = box_at(scores, 0.3), box_size((8, 8), 0.3)
    layout = trace.images[0].layout
    boxes = [set(box) for box in box_cells(corners, size, (8, 8)).tolist()]
    kept = [t for t, row in enumerate(layout.rows) if row < 0 or row % 64 in boxes[row // 64]]
    assert trace.seen[0].entered == kept
    assert sum(row >= 0 for row in layout.rows) == 64 * len(boxes)
    expected, following = greedy(truth.without(kept), 4)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert tokens(trace) == [following]


def test_the_question_decides() -> None:
    """Two questions about one clip show different frames; the same one with other words around it is the prompt's."""
    session = seeing_session(tiny_vision.llava_folder())
    entered = set()
    with attached(session, FreeVideoLLM(slow=1, middle=0, fast=0)):
        for n in range(8):
            item = clip_item(6, prompt=f"{['what', 'where', 'who', 'when'][n % 4]} is it {n} ?")
            entered.add(run_items(session, [item], 1).seen[0].entered[0] // 64)
    assert len(entered) > 1


def test_rows_of_a_batch_are_chosen_by_themselves() -> None:
    session = seeing_session(tiny_vision.llava_folder())
    items = [clip_item(4, id="a"), image_item(id="b"), clip_item(6, id="c", prompt="Who is it?")]
    with attached(session, FreeVideoLLM()):
        together = run_items(session, items, 4)
        alone = [run_items(session, [item], 4) for item in items]
    assert tokens(together) == [tokens(t)[0] for t in alone]
    assert [r.entered for r in together.seen] == [t.seen[0].entered for t in alone]
    assert [r.rank() for r in together.seen if r.rank] == [t.seen[0].rank() for t in alone if t.seen[0].rank]


def test_the_scorers_text_half_counts_as_the_lanes() -> None:
    session = seeing_session(tiny_vision.llava_folder())
    with attached(session, FreeVideoLLM()):
        (beside,) = session.companions
        assert not any("vision_model" in name for name, _ in beside.named_parameters())
    assert not session.companions
    assert not session.selectors


# -- refusals ------------------------------------------------------------------------------
def refused(session: Any, scorer: str = "") -> str:
    with pytest.raises(SpecError) as caught:
        load_scorer(session, scorer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_scorers_that_do_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_vision.llava_folder(), folder, ignore=shutil.ignore_patterns("scorer"))
    session = seeing_session(folder)
    assert "comes with no scorer" in refused(session)
    assert "is no CLIP model" in refused(session, str(tiny_vision.vit_folder()))
    other = tmp_path / "other"
    shutil.copytree(tiny_vision.llava_folder() / "scorer", other)
    config = (other / "config.json").read_text()
    clip = CLIPModel.from_pretrained(other)
    clip.config.vision_config.num_hidden_layers = 2
    del clip.vision_model.encoder.layers[2]
    clip.save_pretrained(other)
    assert (other / "config.json").read_text() != config
    assert "has another vision tower than" in refused(session, str(other))
    assert load_scorer(session, str(tiny_vision.llava_folder() / "scorer")).longest == 32
    load_seeing.cache_clear()


def test_a_clip_in_tiles_is_refused() -> None:
    session = seeing_session(tiny_vision.llava_next_folder())
    with attached(session, FreeVideoLLM()), pytest.raises(Unavailable, match="reads each frame as one view"):
        run_items(session, [clip_item(3, 128, 128)], 2)
