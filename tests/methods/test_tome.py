"""ToMe against the paper's algorithm in plain loops, and the halves of encoder layers against the library's layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from studio_state.errors import Unavailable
from tests import tiny_vision
from tests.methods import encoders, seeing
from tests.methods.driving import attached, image_item, load, run_items, sample_picture, seeing_session, tokens
from tests.methods.encoders import ENCODERS, FRONT, PATCHES
from workers.mechanisms import vision_attention
from workers.mechanisms.token_merging import match, merge_tokens, schedule
from workers.mechanisms.vision_attention import VisionForward
from workers.mechanisms.vision_blocks import between_halves, block_of, hides
from workers.policies.tokens.tome import ToMe
from workers.session import Session

every_encoder = pytest.mark.parametrize("name", ENCODERS)
Groups = list[list[int]]  # per token the patches that went into it


# -- the algorithm in plain words ----------------------------------------------------------
def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def merged(x: Tensor, keys: Tensor, sizes: list[float], groups: Groups, r: int, front: int) -> tuple[Tensor, list[float], Groups]:
    """Bipartite soft matching of x [T, C] by keys [T, D]; the first ``front`` tokens take no part."""
    everything = range(len(x))
    first, second = [t for t in everything if t % 2 == 0], [t for t in everything if t % 2 == 1]
    edges = []
    for a in (t for t in first if t >= front):
        b = max((t for t in second if t >= front), key=lambda t: cosine(keys[a], keys[t]))
        edges.append((cosine(keys[a], keys[b]), a, b))
    edges.sort(key=lambda e: -e[0])
    into = {a: b for _, a, b in edges[:r]}
    order = [t for t in first if t not in into] + second
    order = [t for t in order if t < front] + [t for t in order if t >= front]
    members = {t: [t, *(a for a, b in into.items() if b == t)] for t in order}
    rows = [sum(sizes[m] * x[m] for m in members[t]) / sum(sizes[m] for m in members[t]) for t in order]
    return (
        torch.stack(rows),  # type: ignore[arg-type]
        [sum(sizes[m] for m in members[t]) for t in order],
        [[p for m in members[t] for p in groups[m]] for t in order],
    )


def left_behind(patches: int, keep: float, layers: int) -> list[int]:
    """Patches behind each layer: even steps, the first ones one larger where they do not come out even.

    From behind: no layer gets more than twice what it leaves.
    """
    left = max(1, round(keep * patches))
    steps = [(patches - left + layers - 1 - i) // layers for i in range(layers)]
    plan = [patches - sum(steps[: i + 1]) for i in range(layers)]
    for i in reversed(range(layers - 1)):
        plan[i] = min(plan[i], 2 * plan[i + 1])
    return plan


def tower(layers: Sequence[Any], x: Tensor, keep: float, front: int) -> tuple[Tensor, Groups]:
    """x [T, C] through layers with merging: tokens behind the last one, and which of the first tokens each has."""
    sizes, groups = [1.0] * len(x), [[t] for t in range(len(x))]
    for layer, left in zip(layers, left_behind(len(x) - front, keep, len(layers)), strict=True):
        x, keys, _ = encoders.attend(layer, x, sizes)
        x, sizes, groups = merged(x, keys.mean(0), sizes, groups, len(x) - front - left, front)
        x = encoders.think(layer, x)
    return x, groups


def patch_groups(groups: Groups, front: int) -> set[frozenset[int]]:
    """The same without the tokens at the front, patches counted from 0."""
    return {frozenset(p - front for p in g) for g in groups if min(g) >= front}


def partition(group: Sequence[int]) -> set[frozenset[int]]:
    """Places of equal numbers; -1 is of no group."""
    return {frozenset(i for i, g in enumerate(group) if g == number) for number in set(group) - {-1}}


# -- matching and merging ------------------------------------------------------------------
@pytest.mark.parametrize("front", [0, 1, 2])
@pytest.mark.parametrize("r", [0, 1, 3, 4])
def test_merging_equals_the_paper_in_plain_loops(r: int, front: int) -> None:
    draw = torch.Generator().manual_seed(10 * r + front)
    x, keys = (torch.randn(3, 10, c, generator=draw) for c in (6, 5))
    sizes = torch.randint(1, 5, (3, 10), generator=draw).float()
    got, new_sizes = match(keys, r, front).merge(x, sizes)
    places = match(keys, r, front).new
    for row in range(3):
        rows, row_sizes, groups = merged(x[row], keys[row], sizes[row].tolist(), [[t] for t in range(10)], r, front)
        torch.testing.assert_close(got[row], rows)
        assert new_sizes[row].tolist() == row_sizes
        assert [[t for t in range(10) if places[row, t] == place] for place in range(10 - r)] == [sorted(g) for g in groups]
        assert groups[:front] == [[t] for t in range(front)]


def test_by_hand_two_equal_tokens_become_one() -> None:
    """CLS, then a b a c: the a at place 3 is of the other half, the one at place 1 goes nowhere, so a at 2 is alone."""
    a, b, c = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 0.1])
    keys = torch.stack([torch.tensor([5.0, 5.0]), b, a, a, c])[None]  # halves: (CLS, a, c) and (b, a)
    x = torch.tensor([[[9.0], [1.0], [2.0], [6.0], [4.0]]])
    matching = match(keys, 1, 1)
    out, sizes = matching.merge(x, torch.tensor([[1.0, 1.0, 3.0, 1.0, 1.0]]))
    assert matching.new.tolist() == [[0, 2, 3, 3, 1]]  # left: CLS and c of the first half, then b and a of the second
    assert out.flatten().tolist() == [9.0, 4.0, 1.0, 3.0]  # (3 * 2 + 6) / 4
    assert sizes.tolist() == [[1.0, 1.0, 1.0, 4.0]]


def test_sizes_sum_to_all_tokens_and_cls_stays_first() -> None:
    x = torch.randn(2, 33, 8, generator=torch.Generator().manual_seed(1))
    vision, hidden = VisionForward({}), x
    for r in (9, 7, 5):
        hidden = merge_tokens(vision, hidden, hidden[..., :4], r, 1)
        assert vision.sizes is not None
        assert vision.source is not None
        assert vision.sizes.sum(1).tolist() == [33.0, 33.0]
        assert torch.equal(hidden[:, 0], x[:, 0])
        assert vision.source[:, 0].tolist() == [0, 0]
        for row in range(2):  # brute force: every token is the mean of what came in and now belongs to it
            for token in range(hidden.shape[1]):
                members = (vision.source[row] == token).nonzero()[:, 0]
                assert len(members) == vision.sizes[row, token]
                torch.testing.assert_close(hidden[row, token], x[row, members].mean(0))
    assert hidden.shape[1] == 33 - 21


@pytest.mark.parametrize(("t", "front", "most"), [(2, 1, 0), (3, 1, 1), (10, 1, 4), (10, 2, 4), (9, 0, 4), (4, 2, 1)])
def test_a_layer_merges_at_most_half(t: int, front: int, most: int) -> None:
    matching = match(torch.randn(1, t, 3), 99, front)
    assert matching.left == t - most
    assert sorted(set(matching.new[0].tolist())) == list(range(t - most))


def test_the_schedule_by_hand() -> None:
    assert schedule(64, 32, 2) == [48, 32]
    assert schedule(196, 98, 12) == [187, 178, *range(170, 90, -8)]
    assert schedule(64, 64, 3) == [64, 64, 64]
    assert schedule(16, 1, 4) == [8, 4, 2, 1]  # halves all the way
    assert schedule(196, 10, 12)[-3:] == [40, 20, 10]  # so few only if the last layers halve


@pytest.mark.parametrize("layers", [1, 2, 3, 12, 24])
@pytest.mark.parametrize("patches", [1, 49, 64, 576])
def test_the_schedule_ends_at_the_share_where_it_can(patches: int, layers: int) -> None:
    for left in {1, min(2, patches), patches // 3 or 1, patches // 2 or 1, patches}:
        plan = schedule(patches, left, layers)
        now = patches
        for wanted in plan:
            assert wanted <= now
            now = max(wanted, now - now // 2)
        assert now == left or (left * 2**layers < patches and now == -(-patches // 2**layers))
        if left >= patches / 2:
            assert max(a - b for a, b in pairwise([patches, *plan])) <= -(-(patches - left) // layers)  # even steps


# -- in encoders ---------------------------------------------------------------------------
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
@every_encoder
def test_an_encoder_equals_the_plain_loops(name: str, keep: float) -> None:
    session, model, front = seeing_session(ENCODERS[name](), "classify"), encoders.library(name), FRONT[name]
    with attached(session, ToMe(keep=keep)):
        trace = run_items(session, [image_item("classify"), image_item("classify", picture=sample_picture(seed=7))])
    for row, seed in enumerate((0, 7)):
        with torch.inference_mode():
            x = encoders.embed(model, encoders.pixels_of(session, sample_picture(seed=seed)))[0]
            x, groups = tower(encoders.layers_of(model), x, keep, front)
            expected = encoders.outcome(model, x)
        got = trace.logits[row][0] if trace.logits else trace.features[row]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
        record = trace.seen[row]
        assert partition(record.group) == patch_groups(groups, front)
        assert record.entered == sorted(min(g) for g in patch_groups(groups, front))
        assert record.share == [1.0] * PATCHES
    assert trace.counts["visual_tokens"] == round(keep * PATCHES)
    assert session.acted["tome"] == PATCHES - round(keep * PATCHES)


@torch.no_grad()
def test_a_head_that_reads_the_mean_counts_merged_patches_by_their_number() -> None:
    """DINOv2's classifier: CLS and the mean of the patches."""
    session = seeing_session(tiny_vision.dinov2_folder(classifier=True), "classify")
    with attached(session, ToMe(keep=0.5)):
        trace = run_items(session, [image_item("classify")])
    model = AutoModelForImageClassification.from_pretrained(tiny_vision.dinov2_folder(classifier=True)).eval()
    x, groups = tower(list(model.dinov2.encoder.layer), encoders.embed(model.dinov2, encoders.pixels_of(session))[0], 0.5, 1)
    x = model.dinov2.layernorm(x)
    mean = sum(len(g) * t for t, g in zip(x[1:], groups[1:], strict=True)) / PATCHES
    expected = model.classifier(torch.cat([x[0], mean])).log_softmax(-1)  # type: ignore[list-item]
    torch.testing.assert_close(trace.logits[0][0], expected, rtol=1e-4, atol=2e-5)
    assert trace.counts["visual_tokens"] == PATCHES // 2


@every_encoder
def test_keeping_all_is_the_model_itself(name: str) -> None:
    session = seeing_session(ENCODERS[name](), "classify")
    plain = run_items(session, [image_item("classify")])
    with attached(session, ToMe(keep=1.0)):
        same = run_items(session, [image_item("classify")])
    for a, b in zip((*plain.logits, *plain.features), (*same.logits, *same.features), strict=True):
        assert torch.equal(a, b)
    assert same.counts == plain.counts
    assert session.acted == {}


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.26, 0.77, 0.999])
def test_the_share_is_reached_unless_halving_every_layer_is_not_enough(keep: float) -> None:
    for name in ("vit", "clip_vision"):
        session = seeing_session(ENCODERS[name](), "classify")
        layers = len(encoders.layers_of(encoders.library(name)))
        with attached(session, ToMe(keep=keep)):
            trace = run_items(session, [image_item("classify")])
        assert trace.counts["visual_tokens"] == max(round(keep * PATCHES), PATCHES // 2**layers)


def paired_session() -> tuple[Session, Tensor]:
    """A ViT without positions, and pixels whose patches are the same two by two."""
    session = seeing_session(ENCODERS["vit"](), "classify")
    model: Any = copy.deepcopy(session.model)
    model.vit.embeddings.position_embeddings.data.zero_()
    pixels = torch.randn(1, 3, 8, 4, 4, 4, generator=torch.Generator().manual_seed(3))  # rows, height, pairs, width
    pixels = pixels[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2, -1).reshape(1, 3, 32, 32)
    return replace(session, model=model, built={}), pixels


@pytest.mark.parametrize("weighed", [True, False])
@torch.no_grad()
def test_merging_equal_tokens_is_exact_with_proportional_attention(weighed: bool) -> None:
    session, pixels = paired_session()
    model: Any = session.model
    keys: list[Tensor] = []

    def merge(vision: VisionForward, layer: int, hidden: Tensor) -> Tensor:
        if layer > 0:
            return hidden
        out = merge_tokens(vision, hidden, keys.pop(), PATCHES // 2, 1)
        if not weighed:
            vision.sizes = None
        return out

    plain = model.vit(pixels).last_hidden_state[0, 0]
    forward = VisionForward({model.vit.layers[0].attention: 0}, [lambda call: keys.append(call.key.mean(1))])
    with between_halves(session, merge), vision_attention.seeing(forward) as vision:
        tokens_left = model.vit(pixels).last_hidden_state[0]
    assert tokens_left.shape[0] == 1 + PATCHES // 2
    assert vision.source is not None
    assert partition(vision.source[0, 1:].tolist()) == {frozenset((i, i + 1)) for i in range(0, PATCHES, 2)}
    if weighed:
        torch.testing.assert_close(tokens_left[0], plain, rtol=1e-5, atol=1e-5)
    else:
        assert (tokens_left[0] - plain).abs().max() > 1e-3  # CLS would count for two


# -- in vision-language models -------------------------------------------------------------
def feature_tower(what: seeing.Given, keep: float, front: int, layers: int) -> tuple[list[Tensor], list[Groups]]:
    """Per view: encoder features of all patches [P, C], equal for merged ones, and the groups."""
    inner = what.model.model
    vision = inner.vision_tower if hasattr(inner, "vision_tower") else inner.vision_model
    pixels = what.inputs["pixel_values"].flatten(0, -4)
    if hasattr(inner, "vision_tower"):
        embedded = encoders.embed(vision, pixels)
    else:
        side = pixels.shape[-1] // vision.patch_size
        embedded = vision.embeddings(pixels, torch.ones(len(pixels), side, side, dtype=torch.bool))
    features, found = [], []
    for x in embedded:
        x, groups = tower(list(vision.encoder.layers)[:layers], x, keep, front)
        spread = torch.zeros(PATCHES, x.shape[-1])
        for token, members in zip(x, groups, strict=True):
            for p in members:
                if p >= front:
                    spread[p - front] = token
        features.append(spread)
        found.append(groups)
    return features, found


def with_image(what: seeing.Given, visual: Tensor) -> seeing.Given:
    """With other image tokens [n, D]."""
    embeds = what.embeds.clone()
    embeds[what.places] = visual
    return replace(what, embeds=embeds)


@pytest.mark.parametrize("keep", [0.3, 0.5])
@pytest.mark.parametrize("size", [(128, 128), (64, 128)])
@pytest.mark.parametrize("name", ["llava", "llava_next"])
@torch.no_grad()
def test_a_vlm_reads_each_merged_token_once(name: str, size: tuple[int, int], keep: float) -> None:
    session, item = seeing_session(seeing.FOLDERS[name]()), seeing.one(*size)
    what = seeing.given(seeing.FOLDERS[name](), item)
    with attached(session, ToMe(keep=keep)):
        trace, logits = run_items(session, [item], 5), seeing.prefilled(session, item).logits[0]

    inner = what.model.model
    features, groups = feature_tower(what, keep, 1, 2)
    projected = torch.stack([inner.multi_modal_projector(f) for f in features])
    numbers = torch.full((len(features), PATCHES), -1)
    for view, of_view in enumerate(groups):
        for number, members in enumerate(of_view):
            numbers[view, [p - 1 for p in members if p > 0]] = view * 1000 + number
    if name == "llava_next":
        sizes, strategy = what.inputs["image_sizes"], "default"
        (visual,), _ = inner.pack_image_features([projected], sizes, strategy, image_newline=inner.image_newline)
        (group,), _ = inner.pack_image_features([numbers[..., None]], sizes, strategy, image_newline=torch.tensor([-1]))
        group = group[:, 0]
    else:
        visual, group = projected[0], numbers[0]
    kept = [i for i, g in enumerate(group.tolist()) if g == -1 or g not in group[:i].tolist()]
    short = with_image(what, visual).without(kept)
    expected, text = seeing.greedy(short, 5)

    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert tokens(trace) == [text]
    record = trace.seen[0]
    assert record.entered == kept
    assert partition(record.group) == partition(group.tolist())
    assert [i for i, g in enumerate(record.group) if g == -1] == [i for i, g in enumerate(group.tolist()) if g == -1]
    assert [i for i, s in enumerate(record.share) if s == 1.0] == kept
    assert record.rank is None
    assert record.level == []
    assert trace.counts["visual_tokens"] == len(kept)
    if name == "llava":
        assert len(kept) == round(keep * PATCHES)
    assert trace.counts["prefill_kv_bytes"] == len(short.ids) * 2 * 2 * 2 * 16 * 4


@torch.no_grad()
def test_where_a_token_is_of_several_patches_all_of_them_enter() -> None:
    session, item = seeing_session(tiny_vision.smolvlm_folder()), seeing.one()
    what = seeing.given(tiny_vision.smolvlm_folder(), item)
    with attached(session, ToMe(keep=0.5)):
        trace, logits = run_items(session, [item], 5), seeing.prefilled(session, item).logits[0]
    inner = what.model.model
    features, _ = feature_tower(what, 0.5, 0, 2)
    visual = inner.connector(inner.vision_model.post_layernorm(torch.stack(features))).flatten(0, 1)
    assert (what.embeds[what.places] - visual).abs().max() > 1e-2
    what = with_image(what, visual)
    expected, text = seeing.greedy(what, 5)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert tokens(trace) == [text]
    assert trace.seen[0].entered == list(range(len(what.places)))
    assert trace.seen[0].group == []
    assert trace.seen[0].share == [1.0] * len(what.places)
    assert session.acted["tome"] > 0


@pytest.mark.parametrize("name", ["llava", "llava_next", "smolvlm"])
def test_rows_of_a_batch_are_merged_each_for_itself(name: str) -> None:
    session = seeing_session(seeing.FOLDERS[name]())
    items = [seeing.one(128, 128, id="a"), seeing.one(64, 128, seed=4, id="b")]
    with attached(session, ToMe(keep=0.4)):
        together, single = run_items(session, items, 4), seeing.alone(session, items, 4)
    assert tokens(together) == [tokens(t)[0] for t in single]
    assert [r.entered for r in together.seen] == [t.seen[0].entered for t in single]
    assert [r.group for r in together.seen] == [t.seen[0].group for t in single]


# -- layers taken apart --------------------------------------------------------------------
def siglip() -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**tiny_vision.VISION_SHAPE, image_size=64, patch_size=8))


def dinov2(swiglu: bool) -> Any:
    from transformers import Dinov2Config, Dinov2Model

    shape = {k: v for k, v in tiny_vision.VISION_SHAPE.items() if k != "intermediate_size"}
    return Dinov2Model(Dinov2Config(image_size=56, patch_size=7, mlp_ratio=2, use_swiglu_ffn=swiglu, **shape))


BUILDS: dict[str, Callable[[], Any]] = {
    "vit": lambda: encoders.library("vit").vit,
    "deit": lambda: encoders.library("deit").deit,
    "dinov2": lambda: dinov2(False),
    "dinov2-swiglu": lambda: dinov2(True),
    "clip_vision": lambda: encoders.library("clip_vision"),
    "siglip": siglip,
    "smolvlm": lambda: seeing.library(tiny_vision.smolvlm_folder()).model.vision_model,
    "idefics3": lambda: seeing.library(tiny_vision.idefics3_folder()).model.vision_model,
}


@pytest.mark.parametrize("name", BUILDS)
@torch.no_grad()
def test_both_halves_are_the_librarys_layer_to_the_bit(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUILDS[name]().eval()
        if name.startswith("dinov2"):  # they start as 1
            for parameter_name, x in model.named_parameters():
                if "lambda1" in parameter_name:
                    x.normal_()
        hidden = torch.randn(2, 17, tiny_vision.WIDTH)
    found = model.layers if hasattr(model, "layers") else layers_in(model.encoder)
    for layer in found:
        block = block_of(layer)
        assert (block.scale1 is not None) == name.startswith("dinov2")
        whole = layer(hidden, attention_mask=None)
        assert torch.equal(block.think(block.mix(hidden)), whole[0] if isinstance(whole, tuple) else whole)


def layers_in(encoder: Any) -> Any:
    return encoder.layer if hasattr(encoder, "layer") else encoder.layers


@pytest.mark.parametrize("name", [*ENCODERS, "llava", "llava_next", "smolvlm", "idefics3"])
def test_doing_nothing_between_the_halves_is_the_model_itself(name: str) -> None:
    sees = name in seeing.FOLDERS
    session = seeing_session(seeing.FOLDERS[name]() if sees else ENCODERS[name](), "vqa" if sees else "classify")
    item = image_item("generate" if sees else "classify")
    calls: list[int] = []

    def look(vision: VisionForward, layer: int, hidden: Tensor) -> Tensor:
        calls.append(layer)
        return hidden

    def result() -> tuple[Tensor, ...]:
        return (seeing.prefilled(session, item).logits,) if sees else (*(t := run_items(session, [item])).logits, *t.features)

    plain = result()
    with between_halves(session, look):
        same = result()
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    assert sorted(set(calls)) == list(range(len(session.family.parts(session.model)["vision_layers"])))


def test_other_layers_are_refused_in_one_sentence() -> None:
    from tests import tiny

    with pytest.raises(Unavailable, match="LlamaDecoderLayer"):
        block_of(load(tiny.llama_folder()).model.layers[0])
    with pytest.raises(Unavailable, match="Linear"):
        block_of(nn.Linear(2, 2))


def test_a_mask_that_hides_tokens_is_refused() -> None:
    assert hides(torch.tensor([True, False]))
    assert not hides(torch.tensor([True, True]))
    assert hides(torch.tensor([0.0, -1e9]))
    assert not hides(torch.zeros(2))
    session = seeing_session(tiny_vision.smolvlm_folder())
    layer = session.model.get_submodule(session.family.parts(session.model)["vision_layers"][0])
    with between_halves(session, lambda vision, index, hidden: hidden), pytest.raises(Unavailable, match="pad"):
        layer(torch.zeros(1, 4, tiny_vision.WIDTH), torch.tensor([True, True, False, False]))
