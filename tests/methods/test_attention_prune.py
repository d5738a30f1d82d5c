"""Attention pruning against the library's own layers, which keep all tokens and mask the dropped ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods import encoders
from tests.methods.driving import attached, image_item, run_items, sample_picture, seeing_session
from tests.methods.encoders import ENCODERS, FRONT, PATCHES
from workers.mechanisms.vision_attention import VisionCall, VisionForward
from workers.policies.tokens.attention_prune import AttentionPrune

every_encoder = pytest.mark.parametrize("name", ENCODERS)


@torch.inference_mode()
def masked(name: str, pixels: Tensor, plan: dict[int, int]) -> tuple[Tensor, list[float]]:
    """All tokens through the library's eager layers, dropped ones hidden from the next layer on.

    Returns:
        What the model makes of it, and per patch the share of the layers in which it was seen.
    """
    model, front = encoders.library(name, "eager"), FRONT[name]
    x = encoders.embed(model, pixels)
    layers = encoders.layers_of(model)
    alive, share = list(range(x.shape[1])), [1.0] * PATCHES
    for number, layer in enumerate(layers):
        mask = torch.full((1, 1, 1, x.shape[1]), float("-inf"))
        mask[..., alive] = 0.0
        _, _, weights = encoders.attend(layer, x[0, alive])
        whole = layer(x, attention_mask=mask)
        x = whole[0] if isinstance(whole, tuple) else whole
        if number in plan:
            attention = dict(zip(alive, weights[:, 0].mean(0).tolist(), strict=True))
            patches = sorted((t for t in alive if t >= front), key=lambda t: -attention[t])
            for t in patches[plan[number] :]:
                share[t - front] = (number + 1) / len(layers)
            alive = sorted([*range(front), *patches[: plan[number]]])
    return encoders.outcome(model, x[0]), share


@pytest.mark.parametrize(("keep", "steps"), [(0.5, 1), (0.5, 3), (0.1, 2), (0.9, 3), (0.02, 12)])
@every_encoder
def test_equals_a_masked_run_of_the_library(name: str, keep: float, steps: int) -> None:
    session, policy = seeing_session(ENCODERS[name](), "classify"), AttentionPrune(keep=keep, steps=steps)
    with attached(session, policy):
        trace = run_items(session, [image_item("classify"), image_item("classify", picture=sample_picture(seed=5))])
    plan = policy.plan(len(encoders.layers_of(encoders.library(name))), PATCHES)
    for row, seed in enumerate((0, 5)):
        expected, share = masked(name, encoders.pixels_of(session, sample_picture(seed=seed)), plan)
        got = trace.logits[row][0] if trace.logits else trace.features[row]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
        record = trace.seen[row]
        assert record.share == pytest.approx(share)
        assert record.entered == [p for p, s in enumerate(share) if s == 1.0]
        assert record.group == []
        assert record.layout is not None
        assert len(record.layout.boxes) == len(record.share) == PATCHES
    left = max(1, round(keep * PATCHES))
    assert trace.counts["visual_tokens"] == left
    assert session.acted["attention-prune"] == PATCHES - left


@every_encoder
def test_cls_attention_is_the_eager_librarys(name: str) -> None:
    """Its mean over heads; we sum, which ranks alike."""
    session, model = seeing_session(ENCODERS[name](), "classify"), encoders.library(name, "eager")
    seen: dict[int, Tensor] = {}

    def watch(call: VisionCall) -> None:
        seen[call.layer] = call.cls_attention()

    with session.hooked(session.vision_observers, watch):
        run_items(session, [image_item("classify")])
    with torch.inference_mode():
        attentions = model(encoders.pixels_of(session), output_attentions=True).attentions
    assert sorted(seen) == list(range(len(attentions)))
    for layer, weights in enumerate(attentions):
        torch.testing.assert_close(seen[layer] / encoders.HEADS, weights[:, :, 0, 1:].mean(1), rtol=1e-5, atol=1e-6)
        assert torch.equal(seen[layer].argsort(descending=True), weights[:, :, 0, 1:].mean(1).argsort(descending=True))


def test_cls_attention_counts_merged_tokens_by_their_size() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 4, 8, generator=draw) for _ in "qk")
    sizes = torch.tensor([[1.0, 3.0, 1.0, 2.0]])
    repeated = key[:, :, [0, 1, 1, 1, 2, 3, 3]]
    whole = (query[:, :, :1] @ repeated.transpose(2, 3) * 0.3).softmax(-1).sum(1)[:, 0]
    got = VisionCall(0, query, key, 0.3, VisionForward({}, sizes=sizes)).cls_attention()
    expected = torch.stack([whole[:, 1:4].sum(1), whole[:, 4], whole[:, 5:].sum(1)], 1)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("knobs", "layers", "patches", "plan"),
    [
        ({"keep": 0.5, "steps": 3}, 12, 196, {2: 156, 5: 123, 8: 98}),  # 196 times 0.794, 0.630, 0.5
        ({"keep": 0.25, "steps": 2}, 12, 64, {3: 32, 7: 16}),
        ({"keep": 0.5, "steps": 1}, 2, 64, {0: 32}),
        ({"keep": 0.5, "steps": 3}, 2, 64, {0: 32}),  # the last layer drops nothing that another one would read
        ({"keep": 0.5, "steps": 3}, 3, 64, {0: 45, 1: 32}),
        ({"keep": 0.5, "steps": 12}, 1, 64, {0: 32}),
        ({"keep": 0.02, "steps": 1}, 4, 10, {1: 1}),  # one stays
        ({"keep": 1.0, "steps": 2}, 6, 10, {1: 10, 3: 10}),
    ],
)
def test_the_plan_by_hand(knobs: dict[str, Any], layers: int, patches: int, plan: dict[int, int]) -> None:
    assert AttentionPrune(**knobs).plan(layers, patches) == plan


def test_every_plan_has_all_its_steps_and_ends_at_the_share() -> None:
    for layers in range(2, 40):
        for steps in range(1, 13):
            plan = AttentionPrune(keep=0.3, steps=steps).plan(layers, 196)
            assert len(plan) == min(steps, layers - 1)
            assert list(plan) == sorted(plan)
            assert min(plan) >= 0
            assert max(plan) < layers - 1
            assert list(plan.values()) == sorted(plan.values(), reverse=True)
            assert plan[max(plan)] == round(0.3 * 196)


@every_encoder
def test_keeping_all_is_the_model_itself(name: str) -> None:
    session = seeing_session(ENCODERS[name](), "classify")
    plain = run_items(session, [image_item("classify")])
    with attached(session, AttentionPrune(keep=1.0)):
        same = run_items(session, [image_item("classify")])
    for a, b in zip((*plain.logits, *plain.features), (*same.logits, *same.features), strict=True):
        assert torch.equal(a, b)
    assert same.counts == plain.counts
    assert session.acted == {}


def test_only_the_layers_that_drop_are_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    session, ranked = seeing_session(ENCODERS["clip_vision"](), "classify"), []
    plain = VisionCall.cls_attention

    def counting(call: VisionCall) -> Tensor:
        ranked.append(call.layer)
        return plain(call)

    monkeypatch.setattr(VisionCall, "cls_attention", counting)
    with attached(session, AttentionPrune(keep=0.5, steps=1)):
        run_items(session, [image_item("classify")])
    assert ranked == [1]
