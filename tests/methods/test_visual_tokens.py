"""Image tokens that leave the prompt, against the library's model on a shortened sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import tiny_vision
from tests.methods.driving import image_item, run_items, seeing_session, tokens
from tests.methods.seeing import CLOSE, FOLDERS, alone, drawn, given, greedy, keep_all, one, prefilled, visual
from workers.mechanisms.visual_tokens import LEVELS, Selection, Visual, rank_levels, seed_of, selecting, widened
from workers.workloads.base import Item

NEW = 5  # the first by the prefill, four decode steps
every_model = pytest.mark.parametrize("name", FOLDERS)
SIZES = {  # two pictures with different numbers of image tokens, where a model has such
    "llava": [(128, 128), (64, 96)],
    "llava_next": [(128, 128), (200, 64)],
    "smolvlm": [(128, 128), (256, 64)],
    "idefics3": [(128, 128), (256, 64)],
    "qwen2_5_vl": [(128, 128), (96, 48)],
}


def two(name: str) -> list[Item]:
    return [
        one(*size, seed=i, id=str(i), prompt=p)
        for i, (size, p) in enumerate(zip(SIZES[name], ("What?", "Who is it?"), strict=True))
    ]


@every_model
def test_without_a_selector_it_is_the_library(name: str) -> None:
    session, item = seeing_session(FOLDERS[name]()), one(*SIZES[name][1])
    trace = run_items(session, [item], NEW)
    truth = given(FOLDERS[name](), item)
    assert trace.results[0].prompt_ids == truth.ids.tolist()
    kinds = {"mm_token_type_ids": (truth.ids == truth.model.config.image_token_id).int()[None]} if name.startswith("qwen") else {}
    with torch.inference_mode():
        whole = truth.model(input_ids=truth.ids[None], **truth.inputs, **kinds).logits[0, -1]
    logits, expected = greedy(truth, NEW)
    torch.testing.assert_close(logits, whole, **CLOSE)
    torch.testing.assert_close(prefilled(session, item).logits[0], whole, **CLOSE)
    assert tokens(trace) == [expected]
    assert trace.seen[0].entered == list(range(len(truth.places)))
    assert trace.seen[0].share == [1.0] * len(truth.places)
    assert trace.counts["visual_tokens"] == len(truth.places)


@every_model
def test_keeping_everything_changes_nothing(name: str) -> None:
    session, item = seeing_session(FOLDERS[name]()), one()
    expected, logits = tokens(run_items(session, [item], NEW)), prefilled(session, item).logits
    with selecting(session, "test", 1.0, keep_all):
        assert tokens(run_items(session, [item], NEW)) == expected
        assert torch.equal(prefilled(session, item).logits, logits)
    assert "test" not in session.acted


@pytest.mark.parametrize("keep", [0.02, 0.4])
@every_model
def test_dropped_tokens_leave_as_if_never_there(name: str, keep: float) -> None:
    """Consecutive positions; only Qwen's keep theirs in three directions, and words behind go on where the full prompt ended."""
    session, item = seeing_session(FOLDERS[name]()), one()
    with selecting(session, "test", keep, drawn):
        state = prefilled(session, item)
        trace = run_items(session, [item], NEW)
    full = given(FOLDERS[name](), item)
    count = len(full.places)
    kept = drawn(visual(torch.zeros(count, 1), (1, count)), keep).index.tolist()
    short = full.without(kept)
    logits, expected = greedy(short, NEW, int(full.positions.max()) + 1 if name == "qwen2_5_vl" else len(short.ids))
    torch.testing.assert_close(state.logits[0], logits, **CLOSE)
    assert tokens(trace) == [expected]

    record = trace.seen[0]
    assert record.entered == kept
    assert [i for i, s in enumerate(record.share) if s == 1.0] == kept
    assert [s for s in record.share if s != 1.0] == [0.0] * (count - len(kept))
    assert len(record.layout.boxes) == count
    assert session.acted["test"] == 2 * (count - len(kept))
    gone = set(full.places.tolist()) - set(full.places[kept].tolist())
    assert trace.kept[0] == [[0.0 if i in gone else 1.0 for i in range(len(full.ids))]] * 2
    assert trace.counts["visual_tokens"] == len(kept)
    assert trace.counts["prefill_kv_bytes"] == len(short.ids) * 2 * session.info.layers * session.info.kv_heads * 16 * 4


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_a_prompt_in_chunks_is_the_same(name: str, chunk: int) -> None:
    whole, parts = (seeing_session(FOLDERS[name](), chunk_size=c) for c in (None, chunk))
    states = []
    for session in (whole, parts):
        with selecting(session, "test", 0.3, drawn):
            states.append(prefilled(session, *two(name)))
    torch.testing.assert_close(states[1].logits, states[0].logits, **CLOSE)


@every_model
def test_rows_of_a_batch_equal_single_runs(name: str) -> None:
    """Rows differ in image tokens; the last one has none at all."""
    session = seeing_session(FOLDERS[name]())
    items = [*two(name), Item(id="words", prompt="Only a few words here, no image", ignore_eos=True)]
    for keep in (1.0, 0.3):
        with selecting(session, "test", keep, drawn):
            together, single = run_items(session, items, NEW), alone(session, items, NEW)
            state, apart = prefilled(session, *items), [prefilled(session, item) for item in items]
        assert len(set(state.lengths)) > 1
        assert tokens(together) == [tokens(t)[0] for t in single]
        assert together.kept == [t.kept[0] for t in single]
        assert [r.entered for r in together.seen[:2]] == [t.seen[0].entered for t in single[:2]]
        assert together.seen[2].entered == []
        assert together.seen[2].layout is None
        torch.testing.assert_close(state.logits, torch.cat([s.logits for s in apart]), **CLOSE)


@every_model
def test_words_alone_are_a_plain_language_model(name: str) -> None:
    session = seeing_session(FOLDERS[name]())
    item = Item(id="words", prompt="Only words", ignore_eos=True)
    with selecting(session, "test", 0.1, drawn):
        trace = run_items(session, [item], NEW)
        state = prefilled(session, item)
    truth = given(FOLDERS[name](), one())
    with torch.inference_mode():
        logits = truth.model(input_ids=torch.tensor([trace.results[0].prompt_ids])).logits[0, -1]
    torch.testing.assert_close(state.logits[0], logits, **CLOSE)
    assert "test" not in session.acted


@every_model
def test_a_selector_sees_the_tokens_as_they_lie(name: str) -> None:
    session, item = seeing_session(FOLDERS[name]()), one(*SIZES[name][1])
    asked: list[Visual] = []

    def look(tokens: Visual, keep: float) -> Selection:
        asked.append(tokens)
        return keep_all(tokens, keep)

    with selecting(session, "test", 1.0, look):
        trace = run_items(session, [item], 1)
    (seen,), layout, truth = asked, trace.images[0].layout, given(FOLDERS[name](), item)
    torch.testing.assert_close(seen.features, truth.embeds[truth.places], **CLOSE)
    assert (seen.rows.tolist(), seen.views.tolist()) == (layout.rows, layout.views)
    assert (seen.side, seen.tiles) == (layout.side, layout.tiles)
    assert trace.seen[0].layout.boxes == layout.boxes
    assert seen.placed.tolist() == [r >= 0 for r in layout.rows]
    assert seen.seed == seed_of(0, "one")


def test_selectors_act_in_turn() -> None:
    """The second sees what the first left, and its groups are told for all tokens."""
    session = seeing_session(tiny_vision.llava_folder())
    seen: list[list[int]] = []

    def even(tokens: Visual, keep: float) -> Selection:
        return Selection(torch.arange(0, len(tokens.rows), 2))

    def pairs(tokens: Visual, keep: float) -> Selection:
        seen.append(tokens.rows.tolist())
        return Selection(torch.tensor([0, 2]), tokens.features[[0, 2]] * 2, torch.tensor([0, 0, 2] + [-1] * 29))

    with selecting(session, "even", 0.5, even), selecting(session, "pairs", 0.1, pairs):
        state = prefilled(session, one())
    assert seen == [list(range(0, 64, 2))]
    record = session.seen[0]
    assert record.entered == [0, 4]
    assert record.group[:6] == [0, -1, 0, -1, 2, -1]
    assert record.rank() == [LEVELS[0] if t in (0, 4) else 2.0 for t in range(64)]
    assert session.acted == {"even": 32.0, "pairs": 31.0}
    truth = given(tiny_vision.llava_folder(), one()).without([0, 4])
    truth.embeds[truth.places] *= 2
    torch.testing.assert_close(state.logits[0], greedy(truth, 1)[0], **CLOSE)


def test_levels_are_the_smallest_share_that_keeps_a_token() -> None:
    """Also for a choice where a larger share does not hold a smaller one."""
    session = seeing_session(tiny_vision.llava_folder())

    def jumping(tokens: Visual, keep: float) -> Selection:
        count = max(1, round(keep * 64))
        return Selection(((torch.arange(count) * 5 + count) % 64).sort().values)

    with selecting(session, "test", 0.33, jumping):
        trace = run_items(session, [one()], 1)
    settings = [0.33, *LEVELS]
    everything = visual(torch.zeros(64, 1), (8, 8))
    kept = {keep: set(jumping(everything, keep).index.tolist()) for keep in settings}
    assert trace.seen[0].rank() == pytest.approx([min(k for k in settings if t in kept[k]) for t in range(64)])
    assert kept[0.33] == set(trace.seen[0].entered)


def test_levels_are_of_the_image_that_was_noted() -> None:
    """What a policy noted in the encoder stays with the image, though the next one overwrites it."""
    session = seeing_session(tiny_vision.llava_folder())
    noting: dict[str, Any] = {}

    def best(tokens: Visual, keep: float) -> Selection:
        return Selection(tokens.best(tokens.noted["scores"], tokens.budget(keep)))

    items = [one(seed=i, id=str(i)) for i in (0, 1)]
    orders = [torch.randn(64, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    see = session.family.see

    def noted(*args: Any) -> Any:
        noting["scores"] = orders.pop(0)
        return see(*args)

    session.family.see = noted
    expected = [order.clone() for order in orders]
    with selecting(session, "test", 0.25, best, noting):
        trace = run_items(session, items, 1)
    for record, scores in zip(trace.seen, expected, strict=True):
        assert record.entered == sorted(scores.argsort(descending=True)[:16].tolist())
        level = record.rank()
        assert [t for t in range(64) if level[t] <= 0.25] == record.entered


def test_a_rank_keeps_as_many_as_a_share_leaves() -> None:
    """Rounding included: of 7 tokens 0.5 keeps 4 (round half to even), 0.05 still one."""
    order = [3, 1, 6, 0, 2, 5, 4]
    for keep in (0.37, 0.5):
        level = rank_levels(order, 9, keep)
        assert level[7:] == [2.0, 2.0]
        for share in (*LEVELS, keep):
            assert {t for t in range(7) if level[t] <= share} == set(order[: max(1, round(share * 7))])


def test_best_and_budget_by_hand() -> None:
    """Line breaks stay and do not count; of equals the first stays."""
    tokens = visual(torch.zeros(7, 1), (1, 5), rows=[0, 1, 2, -1, 3, 4, -1])
    scores = torch.tensor([1.0, 3.0, 3.0, 9.0, 0.0, 3.0, 9.0])
    assert tokens.best(scores, 2).tolist() == [1, 2, 3, 6]
    assert [tokens.budget(k) for k in (0.01, 0.3, 0.5, 1.0)] == [1, 2, 2, 5]
    assert tokens.with_breaks(torch.tensor([5, 0])).tolist() == [0, 3, 5, 6]
    assert tokens.placed.tolist() == [True, True, True, False, True, True, False]
    assert tokens.cells == 5
    assert widened(torch.tensor([7, -1]), torch.tensor([1, 3]), 5) == [-1, 7, -1, -1, -1]


@pytest.mark.parametrize("folder", [tiny_vision.llava_folder, tiny_vision.vit_folder])
def test_every_item_draws_for_itself(folder: Any) -> None:
    """By its id and the experiment's seed, in every run the same."""
    sessions = [seeing_session(folder(), "classify" if folder is tiny_vision.vit_folder else "vqa", seed=s) for s in (0, 0, 1)]
    items = [image_item(id=i) for i in ("a", "b")]
    seeds = [[image.seed for image in s.family.begin(s, items).images] for s in sessions]
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 4
    assert all(0 <= s < 2**32 for s in seeds[0])
    assert sessions[0].family.begin(sessions[0], items[::-1]).images[0].seed == seeds[0][1]
