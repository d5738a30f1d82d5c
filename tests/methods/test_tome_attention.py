"""Token merging in a denoiser against the paper's algorithm in plain loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from studio_state.errors import Unavailable
from tests.methods.drawing import (
    OWN,
    broken_off,
    condition,
    draw,
    drawing_session,
    same_pictures,
    sizes_seen,
)
from tests.methods.driving import attached
from workers.mechanisms.merged_attention import MergedAttention, grid_of, match_to, self_attentions, targets_of
from workers.policies.denoise.cfg_skip import GuidanceSkipping
from workers.policies.denoise.fewer_steps import FewerSteps
from workers.policies.denoise.tome_attention import ToMeAttention
from workers.session import Session

STEPS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


# -- grid and targets ------------------------------------------------------------------------
def test_the_grid_of_tokens() -> None:
    assert grid_of(64, 8, 8) == (8, 8)
    assert grid_of(16, 8, 8) == (4, 4)
    assert grid_of(6, 5, 9) == (2, 3)
    assert grid_of(24, 12, 8) == (6, 4)
    assert grid_of(49, 28, 28) == (7, 7)
    with pytest.raises(Unavailable, match="7 tokens fits no grid of a 8 x 8"):
        grid_of(7, 8, 8)


@pytest.mark.parametrize("grid", [(8, 8), (6, 4), (7, 5), (2, 2)])
def test_each_whole_cell_has_one_target(grid: tuple[int, int]) -> None:
    drawn = [targets_of(grid, seed) for seed in range(40)]
    for targets in drawn:
        cells = [(int(i) // grid[1] // 2, int(i) % grid[1] // 2) for i in targets]
        assert sorted(cells) == [(y, x) for y in range(grid[0] // 2) for x in range(grid[1] // 2)]
    assert torch.equal(drawn[3], targets_of(grid, 3))
    firsts = {int(t[0]) for t in drawn}
    assert firsts == {0, 1, grid[1], grid[1] + 1}  # every place of a cell is drawn
    assert len(targets_of((1, 9), 0)) == 0


# -- which tokens become one -----------------------------------------------------------------
def groups(tokens: Tensor, targets: list[int], r: int) -> list[list[int]]:
    """Tokens [T, C] that become one, in plain loops: the target first."""
    into: dict[int, list[int]] = {t: [t] for t in targets}
    found = []
    for i in range(len(tokens)):
        if i not in into:
            likeness = [float(torch.cosine_similarity(tokens[i].double(), tokens[t].double(), dim=0)) for t in targets]
            best = max(range(len(targets)), key=likeness.__getitem__)
            found.append((-likeness[best], i, targets[best]))
    found.sort()
    for _, i, t in found[:r]:
        into[t].append(i)
    return [*into.values(), *([i] for _, i, _ in found[r:])]


def test_pairs_by_hand() -> None:
    a, b = [1.0, 0.0], [0.0, 1.0]
    tokens = torch.tensor([[a, [0.9, 0.1], b, [0.7, 0.6], [0.05, 1.0], [0.0, 3.0]]])
    matching = match_to(tokens, torch.tensor([0, 2]), 3)
    assert matching.left == 3
    new = matching.new[0].tolist()
    assert new[1] == new[0]
    assert new[4] == new[5] == new[2]
    assert len({new[0], new[2], new[3]}) == 3
    merged, sizes = matching.merge(tokens, torch.ones(1, 6))
    torch.testing.assert_close(merged[0, new[0]], torch.tensor([0.95, 0.05]))
    torch.testing.assert_close(merged[0, new[2]], torch.tensor([0.05 / 3, 5 / 3]))
    assert sizes[0, new[2]] == 3


@pytest.mark.parametrize("r", [1, 17, 32, 48, 99])
def test_pairs_equal_the_loops(r: int) -> None:
    tokens, targets = torch.randn(3, 64, 6, generator=torch.Generator().manual_seed(r)), targets_of((8, 8), r)
    matching = match_to(tokens, targets, r)
    assert matching.left == 64 - min(r, 48)
    for row, new in zip(tokens, matching.new.tolist(), strict=True):
        mine: dict[int, set[int]] = {}
        for i, place in enumerate(new):
            mine.setdefault(place, set()).add(i)
        assert sorted(map(sorted, mine.values())) == sorted(sorted(g) for g in groups(row, targets.tolist(), r))
        assert sorted(mine) == list(range(matching.left))


def test_nothing_to_merge() -> None:
    tokens = torch.randn(1, 9, 4)
    for targets, r in ((torch.tensor([], dtype=torch.long), 5), (torch.tensor([0]), 0), (torch.tensor([0]), -1)):
        matching = match_to(tokens, targets, r)
        assert matching.left == 9
        assert torch.equal(matching.merge(tokens, torch.ones(1, 9))[0], tokens)


# -- one attention call ----------------------------------------------------------------------
def transformer_attention() -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=8, heads=2, dim_head=4).eval()


def unet_attention() -> Attention:
    """As the library's blocks of UNet2DModel have it: norm and residual inside."""
    torch.manual_seed(1)
    attn = Attention(
        8, heads=2, dim_head=4, rescale_output_factor=1.5, norm_num_groups=4, residual_connection=True, bias=True
    ).eval()
    with torch.no_grad():
        attn.group_norm.weight.copy_(torch.rand(8) + 0.5)
    return attn


def reference(attn: Any, x: Tensor, targets: list[int], r: int) -> Tensor:
    """Attention [B, T, C] or [B, C, H, W] over merged tokens, row by row and head by head."""
    picture = x.ndim == 4
    tokens = x.flatten(2).transpose(1, 2) if picture else x
    inside = tokens
    if attn.group_norm is not None:
        inside = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
    out = torch.empty_like(tokens)
    for row in range(len(tokens)):
        parts = groups(inside[row], targets, r)
        merged = torch.stack([inside[row, p].mean(0) for p in parts])
        q, k, v = (layer(merged).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        mixed = [torch.softmax(q[:, h] @ k[:, h].T * q.shape[-1] ** -0.5, -1) @ v[:, h] for h in range(attn.heads)]
        answers = attn.to_out[0](torch.cat(mixed, -1))
        for part, answer in zip(parts, answers, strict=True):
            out[row, part] = answer
    out = (out + tokens if attn.residual_connection else out) / attn.rescale_output_factor
    return out.transpose(1, 2).reshape(x.shape) if picture else out


@torch.inference_mode()
@pytest.mark.parametrize("r", [0, 10, 32, 48])
@pytest.mark.parametrize("kind", ["transformer", "unet"])
def test_one_call_equals_the_reference(kind: str, r: int) -> None:
    attn, shape = (transformer_attention(), (3, 64, 8)) if kind == "transformer" else (unet_attention(), (3, 8, 8, 8))
    x, targets = torch.randn(shape, generator=torch.Generator().manual_seed(2)), targets_of((8, 8), 4)
    plain = attn(x)
    library = attn.processor
    attn.processor = MergedAttention(library, lambda tokens, grid: match_to(tokens, targets, r))
    got = attn(x) if kind == "transformer" else attn(x, temb=torch.zeros(3, 4))
    torch.testing.assert_close(got, reference(attn, x, targets.tolist(), r), rtol=1e-5, atol=1e-6)
    assert torch.allclose(got, plain, rtol=1e-5, atol=1e-6) == (r == 0)
    attn.processor = MergedAttention(library, lambda tokens, grid: None)
    assert torch.equal(attn(x), plain)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["transformer", "unet"])
def test_equal_tokens_merge_without_a_change(kind: str) -> None:
    """Where the four tokens of every cell are equal and all merge, attention weighs each cell as before."""
    attn = transformer_attention() if kind == "transformer" else unet_attention()
    cells = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(3))
    picture = cells.repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = picture.flatten(2).transpose(1, 2).contiguous() if kind == "transformer" else picture
    plain = attn(x)
    seen: list[int] = []

    def pairs(tokens: Tensor, grid: Any) -> Any:
        matching = match_to(tokens, targets_of((8, 8), 0), 48)
        seen.append(matching.left)
        return matching

    attn.processor = MergedAttention(attn.processor, pairs)
    torch.testing.assert_close(attn(x), plain, rtol=1e-5, atol=1e-6)
    assert seen == [16]


@torch.inference_mode()
def test_cross_attention_and_masks_stay_the_librarys() -> None:
    attn, x = transformer_attention(), torch.randn(2, 16, 8)
    text, mask = torch.randn(2, 5, 8), torch.zeros(2, 1, 16)
    expected = attn(x, encoder_hidden_states=text), attn(x, attention_mask=mask)

    def never(tokens: Tensor, grid: Any) -> None:
        raise AssertionError("asked for pairs")

    attn.processor = MergedAttention(AttnProcessor2_0(), never)
    assert torch.equal(attn(x, encoder_hidden_states=text), expected[0])
    assert torch.equal(attn(x, attention_mask=mask), expected[1])


# -- whole pipelines -------------------------------------------------------------------------
def attention_tokens(session: Session, *policies: Any) -> tuple[Any, list[int]]:
    """A run, and how many tokens each self-attention call of it looked at."""
    seen: list[int] = []
    handles = [
        m.to_q.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1])) for m in self_attentions(session)
    ]
    trace = draw(session, *policies)
    for handle in handles:
        handle.remove()
    return trace, seen


@pytest.mark.parametrize(
    ("kind", "knobs", "left"),
    [
        ("dit", {}, {16: 8}),
        ("pixart", {"keep": 0.25}, {16: 4}),
        ("pixart", {"keep": 0.9}, {16: 14}),
        ("stable-diffusion", {}, {64: 32}),
        ("stable-diffusion", {"min_tokens": 16}, {64: 32, 16: 8}),
        ("stable-diffusion", {"min_tokens": 16, "keep": 0.25}, {64: 16, 16: 4}),
        (OWN, {}, {64: 32}),
        (OWN, {"min_tokens": 1, "keep": 0.3}, {64: 19, 16: 5}),
    ],
)
def test_so_many_tokens_attend(kind: str, knobs: dict[str, Any], left: dict[int, int], folders: Path) -> None:
    session = drawing_session(kind, folders)
    plain, whole = attention_tokens(session)
    trace, seen = attention_tokens(session, ToMeAttention(**knobs))
    assert seen == [left.get(n, n) for n in whole]
    assert seen != whole
    assert trace.counts["merged_tokens"] == pytest.approx((sum(whole) - sum(seen)) / len(whole))
    assert session.acted["tome-attention"] == sum(whole) - sum(seen)
    assert not same_pictures(trace, plain)
    assert all(bool(p.isfinite().all()) for p in trace.drawn)


@pytest.mark.parametrize("kind", [OWN, "dit", "stable-diffusion", "pixart"])
def test_neutral_and_nothing_merged_are_the_model_itself(kind: str, folders: Path) -> None:
    session = drawing_session(kind, folders)
    plain = draw(session)
    assert same_pictures(draw(session, ToMeAttention(keep=1.0)), plain)
    idle = ToMeAttention(min_tokens=1000)
    assert same_pictures(draw(session, idle), plain)
    assert session.acted == {}
    assert "merged nothing: no self-attention has 1000 tokens" in idle.why_idle(session)


def test_a_picture_does_not_depend_on_its_batch_or_the_run_before(folders: Path) -> None:
    """Rows are matched each for itself; batches of another size round differently."""
    session = drawing_session("dit", folders)
    both = draw(session, ToMeAttention())
    assert same_pictures(both, draw(session, ToMeAttention()))
    alone = draw(session, ToMeAttention(), seeds=(6,))
    torch.testing.assert_close(alone.drawn[0], both.drawn[1], rtol=1e-4, atol=1e-4)


def test_with_the_other_policies_of_its_stage(folders: Path) -> None:
    session = drawing_session("stable-diffusion", folders)
    with sizes_seen(session.model.denoiser.conv_in) as rows:  # type: ignore[union-attr]
        trace = draw(session, FewerSteps(), GuidanceSkipping(then="reuse"), ToMeAttention())
    assert rows == [4, 4, 2, 2]
    assert trace.counts["denoising_steps"] == 4
    assert trace.counts["guided_steps"] == 2
    assert trace.counts["merged_tokens"] > 0
    assert set(session.acted) == {"fewer-steps", "cfg-skip", "tome-attention"}


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_attention_over_picture_and_text_is_refused(kind: str, folders: Path) -> None:
    session = drawing_session(kind, folders)
    before = condition(session)
    with pytest.raises(Unavailable, match="joins the picture's tokens with a text's"), attached(session, ToMeAttention()):
        pass
    assert condition(session) == before


def test_a_denoiser_without_self_attention_is_refused(folders: Path) -> None:
    from dataclasses import replace

    from workers.families.class_pipeline import ClassConditionalPipeline
    from workers.families.diffusion_model import DiffusionModel

    session = drawing_session(OWN, folders)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=4,
    )
    pipeline = ClassConditionalPipeline(unet=unet, scheduler=session.model.pipeline.scheduler)  # type: ignore[union-attr]
    bare = replace(session, model=DiffusionModel(pipeline))
    with pytest.raises(Unavailable, match="no self-attention"), attached(bare, ToMeAttention()):
        pass


def test_everything_is_undone(folders: Path) -> None:
    for kind in (OWN, "dit"):
        session, policy = drawing_session(kind, folders), ToMeAttention()
        before, pictures = condition(session), draw(session)
        draw(session, policy)
        assert condition(session) == before
        with pytest.raises(KeyboardInterrupt):
            broken_off(session, policy)
        assert condition(session) == before
        assert same_pictures(draw(session), pictures)
