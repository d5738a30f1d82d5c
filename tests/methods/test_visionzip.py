"""VisionZip against an example worked by hand, and against the library's encoder taken apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny_vision
from tests.methods.driving import run_items, seeing_session, tokens
from tests.methods.seeing import CLOSE, FOLDERS, alone, given, greedy, library, one, prefilled, visual
from workers.mechanisms.visual_tokens import Selection
from workers.policies.tokens.visionzip import Choice, VisionZip

with_cls = pytest.mark.parametrize("name", ["llava", "llava_next"])


def doubling() -> nn.Module:
    """A projector that is easy to follow."""
    projector = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        projector.weight.copy_(2 * torch.eye(2))
    return projector.requires_grad_(False)


HIDDEN = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 8.0], [6.0, 0.0], [8.0, 4.0]])
ATTENTION = torch.tensor([0.9, 0.1, 0.5, 0.2, 0.3, 0.05])
KEYS = torch.tensor([[0.0, 1.0], [1.0, 0.1], [0.0, 1.0], [0.2, 9.0], [0.1, 1.0], [5.0, 0.0]])


def zipped(keep: float, context: float, keys: Tensor = KEYS) -> Selection:
    noted = {"attention": ATTENTION[None], "keys": keys[None], "hidden": HIDDEN[None]}
    return Choice(VisionZip(context=context), doubling()).choose(visual(2 * HIDDEN, (2, 3), noted=noted), keep)


def test_six_tokens_by_hand() -> None:
    """Four stay, two of them merged: 0 and 2 dominate; of 1, 3, 4, 5 the anchors are 1 and 4, and by keys 5 is like 1, 3 like 4."""
    chosen = zipped(0.67, 0.5)
    assert chosen.index.tolist() == [0, 1, 2, 4]
    # 0 and 2 as they were; 1: twice the mean of (2, 0) and (8, 4); 4: twice the mean of (4, 8) and (6, 0)
    assert chosen.features is not None
    assert chosen.features.tolist() == [[2.0, 0.0], [10.0, 4.0], [6.0, 0.0], [10.0, 8.0]]
    assert chosen.group is not None
    assert chosen.group.tolist() == [0, 1, 2, 4, 4, 1]


def test_an_anchor_stands_for_itself() -> None:
    """Even if it is more like another one: with all keys equal the second anchor would lose itself to the first."""
    chosen = zipped(0.67, 0.5, torch.ones(6, 2))
    assert chosen.index.tolist() == [0, 1, 2, 4]
    assert chosen.group is not None
    assert chosen.group.tolist() == [0, 1, 2, 1, 4, 1]
    assert chosen.features is not None
    assert chosen.features[3].tolist() == [12.0, 0.0]
    torch.testing.assert_close(chosen.features[1], 2 * HIDDEN[[1, 3, 5]].mean(0))


def test_without_context_it_is_the_best_by_cls() -> None:
    for keep, kept in ((0.01, [0]), (0.34, [0, 2]), (0.5, [0, 2, 4]), (0.84, [0, 1, 2, 3, 4])):
        chosen = zipped(keep, 0.0)
        assert chosen.index.tolist() == kept
        assert chosen.features is not None
        assert torch.equal(chosen.features, 2 * HIDDEN[kept])
        assert chosen.group is not None
        assert chosen.group.tolist() == [t if t in kept else -1 for t in range(6)]


def test_a_single_token_dominates() -> None:
    """However large the share of merged ones is."""
    assert zipped(0.17, 0.9).index.tolist() == [0]


def test_everything_stays_as_it_is_at_a_full_budget() -> None:
    chosen = zipped(1.0, 0.5)
    assert chosen.index.tolist() == list(range(6))
    assert chosen.features is chosen.group is None


def by_hand(
    keep: float, context: float, rows: list[int], cells: int, attention: Tensor, keys: Tensor, hidden: Tensor
) -> tuple[list[int], dict[int, Tensor], list[int]]:
    """Tokens kept, hidden rows of the merged ones, and groups, in plain Python.

    Args:
        attention: [P, C]; keys: [P, C, d]; hidden: [P, C, D].
    """
    kept, merged, group = [t for t, r in enumerate(rows) if r < 0], {}, [-1] * len(rows)
    for view in range(len(attention)):
        mine = {t: r % cells for t, r in enumerate(rows) if r >= 0 and r // cells == view}
        budget = max(1, round(keep * len(mine)))
        few = min(round(context * budget), budget - 1)
        best = sorted(mine, key=lambda t: -float(attention[view, mine[t]]))[: budget - few]
        rest = [t for t in mine if t not in best]
        anchors = [rest[i * len(rest) // few] for i in range(few)]
        members: dict[int, list[int]] = {a: [a] for a in anchors}
        for t in rest:
            if few and t not in anchors:
                alike = [float(torch.cosine_similarity(keys[view, mine[t]], keys[view, mine[a]], dim=0)) for a in anchors]
                members[anchors[alike.index(max(alike))]].append(t)
        for anchor, those in members.items():
            merged[anchor] = torch.stack([hidden[view, mine[t]] for t in those]).mean(0)
        group = [next((a for a, those in members.items() if t in those), t if t in best else g) for t, g in enumerate(group)]
        kept += [*best, *anchors]
    return sorted(kept), merged, group


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("keep", "few"), [(0.3, 0.16), (0.5, 0.5), (0.9, 0.9), (0.05, 0.3)])
def test_every_view_has_its_own_budget(seed: int, keep: float, few: float) -> None:
    """Three views of 4 x 4, the last one without its upper half, line breaks between."""
    draw = torch.Generator().manual_seed(seed)
    rows = [*range(16), *range(16, 20), -1, *range(20, 32), -1, *range(40, 48), -1]
    noted = {
        "attention": torch.rand(3, 16, generator=draw),
        "keys": torch.randn(3, 16, 3, generator=draw),
        "hidden": torch.randn(3, 16, 2, generator=draw),
    }
    features = torch.randn(len(rows), 2, generator=draw)
    tokens = visual(features, (4, 4), (1, 2), rows=rows, noted=noted)
    chosen = Choice(VisionZip(context=few), doubling()).choose(tokens, keep)
    kept, merged, group = by_hand(keep, few, rows, 16, **noted)
    assert chosen.index.tolist() == kept
    assert chosen.group is not None
    assert chosen.group.tolist() == group
    assert chosen.features is not None
    torch.testing.assert_close(chosen.features, torch.stack([2 * merged[t] if t in merged else features[t] for t in kept]))


# -- in a run ------------------------------------------------------------------------------
@torch.inference_mode()
def noted_by_the_library(name: str, item: Any) -> dict[str, Tensor]:
    """Attention of CLS, mean key and hidden state of every patch in the second of three layers."""
    tower = library(FOLDERS[name](), "eager").model.vision_tower
    pixels = given(FOLDERS[name](), item).inputs["pixel_values"].flatten(0, -4)
    out = tower(pixels, output_attentions=True, output_hidden_states=True)
    layer = next(m for n, m in tower.named_modules() if n.endswith("layers.1"))
    keys = layer.self_attn.k_proj(layer.layer_norm1(out.hidden_states[1]))
    keys = keys.view(*keys.shape[:2], 4, -1).mean(2)
    return {"attention": out.attentions[1][:, :, 0, 1:].sum(1), "keys": keys[:, 1:], "hidden": out.hidden_states[-2][:, 1:]}


@pytest.mark.parametrize("few", [0.0, 0.16, 0.6])
@with_cls
def test_merged_tokens_are_the_projection_of_the_mean(name: str, few: float) -> None:
    folder = FOLDERS[name]()
    session, item = seeing_session(folder), one(200, 64)
    with VisionZip(keep=0.3, context=few).attach(session):
        state = prefilled(session, item)
        trace = run_items(session, [item], 4)
    rows = trace.images[0].layout.rows
    kept, merged, group = by_hand(0.3, few, rows, 64, **noted_by_the_library(name, item))
    assert bool(merged) == (few > 0)
    record = trace.seen[0]
    assert (record.entered, record.group) == (kept, group)
    truth = given(folder, item)
    with torch.inference_mode():
        for t, hidden in merged.items():
            truth.embeds[truth.places[t]] = truth.model.model.multi_modal_projector(hidden[None])[0]
    logits, following = greedy(truth.without(kept), 4)
    torch.testing.assert_close(state.logits[0], logits, **CLOSE)
    assert tokens(trace) == [following]


@with_cls
def test_a_full_budget_is_the_whole_model(name: str) -> None:
    session, item = seeing_session(FOLDERS[name]()), one()
    expected = prefilled(session, item).logits
    with VisionZip(keep=1.0).attach(session):
        assert torch.equal(prefilled(session, item).logits, expected)
    assert "visionzip" not in session.acted


def test_every_row_of_a_batch_has_its_own_image() -> None:
    """Also for the levels, which are worked out when the batch is long over and the policy is gone."""
    session = seeing_session(tiny_vision.llava_next_folder())
    items = [one(128, 128, seed=1, id="a"), one(200, 64, seed=2, id="b")]
    with VisionZip(keep=0.2).attach(session):
        together, single = run_items(session, items, 4), alone(session, items, 4)
    assert tokens(together) == [tokens(t)[0] for t in single]
    for record, other in zip(together.seen, single, strict=True):
        assert (record.entered, record.group) == (other.seen[0].entered, other.seen[0].group)
        assert record.rank() == other.seen[0].rank()
    for item, record in zip(items, together.seen, strict=True):
        level = record.rank()
        for keep in (0.1, 0.5):
            with VisionZip(keep=keep).attach(session):
                entered = run_items(session, [item], 1).seen[0].entered
            assert all(level[t] <= keep for t in entered)


def test_no_trace_is_left() -> None:
    session = seeing_session(tiny_vision.llava_folder())

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in session.model.modules())

    before = hooks()
    with VisionZip().attach(session):
        assert hooks() == before + 1
        prefilled(session, one())
    assert hooks() == before
    assert not session.selectors
    assert not session.vision_observers
