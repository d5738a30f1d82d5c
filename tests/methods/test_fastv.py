"""FastV against the library's layers run on the full sequence, where a mask hides what was dropped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import tiny_vision
from tests.methods.driving import attached, image_item, run_items, seeing_session, tokens
from tests.methods.seeing import CLOSE, FOLDERS, Given, Logits, given, greedy, one, prefilled
from workers.families.parts import DECODERS, child
from workers.mechanisms.visual_tokens import LEVELS
from workers.policies.tokens.fastv import FastV
from workers.policies.tokens.random_visual import RandomVisual
from workers.workloads.base import Item

DEEP = 4


def folders() -> list[tuple[Path, int]]:
    """Models and the layers in front of the choice: LLaVA with four layers, the others with two."""
    return [(tiny_vision.llava_folder(DEEP), k) for k in (1, 2, 3)] + [(f(), 1) for n, f in FOLDERS.items() if n != "llava"]


def through_layers(what: Given, first: int, dropped: Tensor) -> Logits:
    """The library's layers one by one; those from ``first`` on do not see the ``dropped`` places."""
    decoder = child(what.model.model, DECODERS)
    assert decoder is not None

    def logits(embeds: Tensor, positions: Tensor) -> Tensor:
        x, length = embeds, embeds.shape[1]
        rope = decoder.rotary_emb(x, positions)
        causal = torch.full((length, length), torch.finfo(x.dtype).min).triu(1)[None, None]
        hiding = causal.clone()
        hiding[..., dropped] = torch.finfo(x.dtype).min
        for number, layer in enumerate(decoder.layers):
            mask = causal if number < first else hiding
            x = layer(x, attention_mask=mask, position_ids=None, position_embeddings=rope)
        result: Tensor = what.model.lm_head(decoder.norm(x))[0, -1]
        return result

    return logits


@torch.inference_mode()
def ranked(folder: Path, item: Item, layer: int) -> list[int]:
    """Image tokens by the attention of the prompt's last token in one layer, mean over heads; the best first."""
    what = given(folder, item, "eager")
    maps = what.model(
        inputs_embeds=what.embeds[None], position_ids=what.positions[..., None, :], use_cache=False, output_attentions=True
    ).attentions
    attention = maps[layer][0, :, -1].mean(0)[what.places]
    return attention.argsort(descending=True, stable=True).tolist()


@pytest.mark.parametrize("keep", [0.1, 0.5])
@pytest.mark.parametrize("case", range(len(FOLDERS) + 2))
def test_equals_a_mask_over_the_full_sequence(case: int, keep: float) -> None:
    """Logits at the prompt's end and the tokens behind it; positions stay those of the full prompt."""
    folder, layer = folders()[case]
    session, item = seeing_session(folder), one(96, 96)
    with FastV(keep=keep, layer=layer).attach(session):
        state = prefilled(session, item)
        trace = run_items(session, [item], 5)
    what = given(folder, item)
    count = len(what.places)
    kept = sorted(ranked(folder, item, layer - 1)[: max(1, round(keep * count))])
    dropped = what.places[[t for t in range(count) if t not in kept]]
    torch.testing.assert_close(
        through_layers(what, DEEP, dropped)(what.embeds[None], what.positions[..., None, :]), greedy(what, 1)[0], **CLOSE
    )
    logits, following = greedy(what, 5, logits=through_layers(what, layer, dropped))
    torch.testing.assert_close(state.logits[0], logits, **CLOSE)
    assert tokens(trace) == [following]

    layers, everything = len(state.cache.layers), [1.0] * len(what.ids)
    left = [0.0 if i in set(dropped.tolist()) else 1.0 for i in range(len(what.ids))]
    assert trace.kept[0] == [everything] * layer + [left] * (layers - layer)
    record = trace.seen[0]
    assert record.entered == list(range(count))
    assert record.share == [1.0 if t in kept else layer / layers for t in range(count)]
    assert session.acted["fastv"] == 2 * len(dropped)
    assert trace.counts["visual_tokens"] == count


def test_levels_tell_what_every_share_keeps() -> None:
    folder = tiny_vision.llava_folder(DEEP)
    session, item = seeing_session(folder), one()
    order = ranked(folder, item, 1)
    for keep in (0.37, 1.0):
        with FastV(keep=keep).attach(session):
            record = run_items(session, [item], 1).seen[0]
        assert record.rank is None
        for share in (*LEVELS, keep):
            assert {t for t in range(64) if record.level[t] <= share} == set(order[: max(1, round(share * 64))])
        assert [t for t in range(64) if record.level[t] <= keep] == [t for t in range(64) if record.share[t] == 1.0]


def test_behind_a_selector_it_chooses_among_those_that_entered() -> None:
    folder = tiny_vision.llava_folder(DEEP)
    session, item = seeing_session(folder), one()
    with RandomVisual(keep=0.5).attach(session):
        prefilled(session, item)
    entered = session.seen[0].entered
    with attached(session, RandomVisual(keep=0.5), FastV(keep=0.25)):
        state = prefilled(session, item)
        trace = run_items(session, [item], 1)
    what = given(folder, item, "eager").without(entered)
    with torch.inference_mode():
        maps = what.model(inputs_embeds=what.embeds[None], use_cache=False, output_attentions=True).attentions
        order = maps[1][0, :, -1].mean(0)[what.places].argsort(descending=True, stable=True).tolist()
        dropped = what.places[sorted(order[8:])]
        logits = through_layers(what, 2, dropped)(what.embeds[None], what.positions[None])
    torch.testing.assert_close(state.logits[0], logits, **CLOSE)
    record = trace.seen[0]
    kept = {entered[i] for i in order[:8]}
    assert record.entered == entered
    assert record.share == [1.0 if t in kept else 0.5 if t in entered else 0.0 for t in range(64)]
    assert {t for t in range(64) if record.level[t] <= 0.25} == kept
    assert {t for t in range(64) if record.level[t] <= 1.0} == set(entered)


def test_words_alone_and_a_full_budget_change_nothing() -> None:
    session = seeing_session(tiny_vision.llava_folder(DEEP))
    for item, keep in ((one(), 1.0), (one(), 0.999), (Item(id="words", prompt="Only words"), 0.1)):
        expected = prefilled(session, item).logits
        with FastV(keep=keep).attach(session):
            assert torch.equal(prefilled(session, item).logits, expected)
    assert "fastv" not in session.acted
    assert "no prompt held an image" in FastV().why_idle(session)


def test_decoding_does_not_notice() -> None:
    """Layers are hooked during the prefill only."""
    session = seeing_session(tiny_vision.llava_folder(DEEP))

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in session.model.modules())

    before = hooks()
    with FastV(keep=0.2).attach(session):
        prefilled(session, image_item())
        assert hooks() == before
    assert not session.observers
