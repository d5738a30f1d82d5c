"""Clips: what they show, what is asked about them, and how any model that sees reads several frames."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from studio_state.errors import WorkloadError
from tests.methods.driving import attached, clip_item, run_items, seeing_session, tokens
from tests.methods.seeing import CLOSE, FOLDERS, given, greedy, prefilled
from workers.data import scenes
from workers.data.clips import CLIP_KINDS, LONGEST, PASSING, STAYING, Clip, ClipPicture, held_out_clip, make_clip
from workers.data.pictures import side_by_side
from workers.policies.tokens.divprune import DivPrune
from workers.policies.tokens.hired import HiRED
from workers.policies.tokens.tome import ToMe
from workers.policies.tokens.visionzip import VisionZip
from workers.workloads.base import ItemContext, ItemResult
from workers.workloads.vqa_clips import BLIND, VQAClips

CTX = ItemContext(None)
FRAMES = 8


# -- the clips themselves ------------------------------------------------------------------
def test_what_stays_is_in_every_frame_and_what_passes_in_one_or_two() -> None:
    for n in range(60):
        clip = make_clip(np.random.default_rng(n))
        seen = Counter(t for frame in clip.frames for t in frame.things)
        assert sorted(seen.values(), reverse=True)[:STAYING] == [FRAMES] * STAYING
        passing = sorted(seen.values(), reverse=True)[STAYING:]
        assert len(passing) == PASSING == len(clip.passing)
        assert set(passing) <= set(range(1, LONGEST + 1))
        assert len({t.cell for t in seen}) == len({t.name for t in seen}) == len(seen)
        for visit in clip.passing:
            where = [f for f, frame in enumerate(clip.frames) if visit.thing in frame.things]
            assert where == list(range(visit.first, visit.end))


def evaluate(clip: Clip, text: str) -> str:
    """A second evaluator: the answer from everything that is in some frame."""
    things = {(t.colour, t.shape) for frame in clip.frames for t in frame.things}
    words = text.split()
    if words[0] == "is":
        return "yes" if tuple(words[3:5]) in things else "no"
    named = words[-2]
    (answer,) = [c if s == named else s for c, s in things if named in (c, s)]
    return answer


def test_every_answer_is_right_and_about_something_that_passes() -> None:
    items = VQAClips(items=900).make_items(CTX)
    for item in items:
        assert isinstance(item.image, ClipPicture)
        assert evaluate(item.image.clip, item.prompt) == item.expected, item.id
        assert set(item.prompt.split()) | {item.expected} <= set(scenes.WORDS)
    for n in range(300):
        clip, questions = held_out_clip(0, n)
        assert [q.kind for q in questions] == list(CLIP_KINDS)
        assert all(q.visit in clip.passing for q in questions if q.answer != "no")
    assert Counter(i.expected for i in items if i.data["kind"] == "exists").keys() == {"yes", "no"}


def test_what_a_blind_model_scores_is_what_the_card_says() -> None:
    items = VQAClips(items=900).make_items(CTX)
    answers = {kind: Counter(i.expected for i in items if i.data["kind"] == kind) for kind in CLIP_KINDS}
    guessed = {kind: str(found.most_common(1)[0][0]) for kind, found in answers.items()}
    right = [VQAClips().grade(ItemResult(i, text=guessed[i.data["kind"]])).correct for i in items]
    assert round(sum(map(bool, right)) / len(items), 2) == BLIND == VQAClips.card.chance
    assert f"{100 * BLIND:.0f} %" in VQAClips.card.detects


def test_a_seed_names_the_clips() -> None:
    items = VQAClips(items=9).make_items(CTX)
    assert VQAClips(items=4).make_items(CTX) == items[:4]
    assert VQAClips(items=9).make_items(ItemContext(None, 1)) != items
    assert [i.id for i in items[:4]] == ["clip-0-colour-of", "clip-0-shape-of", "clip-0-exists", "clip-1-colour-of"]
    only = VQAClips(items=2, kinds=" exists ").make_items(CTX)
    assert [i.id for i in only] == ["clip-0-exists", "clip-1-exists"]
    assert only[0] == items[2]


@pytest.mark.parametrize(
    ("kinds", "part"),
    [
        ("color-of", "there is no kind of question 'color-of'; did you mean 'colour-of'? allowed: "),
        (" , ", "kinds is empty; name"),
    ],
)
def test_kinds_that_are_none(kinds: str, part: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        VQAClips(kinds=kinds).make_items(CTX)
    assert part in str(caught.value)


@pytest.mark.parametrize(("text", "correct"), [("red", True), (" Red.", True), ("it is red", False), ("", False)])
def test_answers_by_hand(text: str, correct: bool) -> None:
    item = VQAClips(items=1).make_items(CTX)[0]
    item = type(item)("c", expected="red", data=item.data)
    grade = VQAClips().grade(ItemResult(item, text=text))
    assert (grade.correct, grade.metrics, grade.data) == (correct, {"accuracy": float(correct)}, {"kind": "colour-of"})


def test_frames_side_by_side() -> None:
    clip = make_clip(np.random.default_rng(0), 6)
    picture = ClipPicture(clip)
    whole, frames = np.asarray(picture.open()), [np.asarray(f) for f in picture.frames()]
    assert whole.shape == (2 * 96, 4 * 96, 3)
    for n, frame in enumerate(frames):
        top, left = 96 * (n // 4), 96 * (n % 4)
        assert (whole[top : top + 96, left : left + 96] == frame).all()
        assert (frame == np.asarray(clip.frames[n].image)).all()
    assert (whole[96:, 192:] == 255).all()
    assert side_by_side(picture.frames()[:2]).size == (192, 96)


# -- in a model ----------------------------------------------------------------------------
@pytest.mark.parametrize("name", FOLDERS)
def test_several_frames_are_read_as_the_library_reads_them(name: str) -> None:
    session, item = seeing_session(FOLDERS[name]()), clip_item(3)
    truth = given(FOLDERS[name](), item)
    expected, following = greedy(truth, 4)
    trace = run_items(session, [item], 4)
    torch.testing.assert_close(prefilled(session, item).logits[0], expected, **CLOSE)
    assert tokens(trace) == [following]
    layout = trace.images[0].layout
    assert layout.frames == 3
    assert len(layout.boxes) == len(layout.rows) == len(layout.views) == len(truth.places)


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_of_a_frame_lie_where_it_is_shown(name: str) -> None:
    session = seeing_session(FOLDERS[name]())
    one, clip = (session.family.begin(session, [clip_item(n)]).images[0].layout for n in (1, 5))
    assert one.frames == 1
    per = len(one.boxes)
    assert len(clip.boxes) == 5 * per
    cells = one.side[0] * one.side[1]
    given_rows = -(-(max(one.rows) + 1) // cells) * cells  # what lies in padding at the end of a view has a row too
    for frame in range(5):
        column, row = frame % 4, frame // 4
        part = slice(frame * per, (frame + 1) * per)
        assert [bool(box) for box in clip.boxes[part]] == [bool(box) for box in one.boxes]
        for box, old in zip(clip.boxes[part], one.boxes, strict=True):
            by_hand = [(at + x / 1e4) / n for at, x, n in zip((column, row) * 2, old, (4, 2) * 2, strict=False)]
            assert np.allclose(box, [1e4 * x for x in by_hand], atol=1)
        assert clip.views[part] == one.views
        assert clip.rows[part] == [r if r < 0 else r + frame * given_rows for r in one.rows]


@pytest.mark.parametrize("policy", [DivPrune(keep=0.25), HiRED(keep=0.25), VisionZip(keep=0.25), ToMe(keep=0.25)])
def test_other_policies_drop_tokens_of_clips_too(policy: DivPrune | HiRED | VisionZip | ToMe) -> None:
    session = seeing_session(FOLDERS["llava"]())
    with attached(session, policy):
        record = run_items(session, [clip_item(4)], 4).seen[0]
    assert len(record.entered) == 64
    if isinstance(policy, HiRED | VisionZip):  # every frame has its own budget
        assert Counter(t // 64 for t in record.entered) == dict.fromkeys(range(4), 16)
    assert session.acted[policy.card.id] > 0
