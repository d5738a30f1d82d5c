"""DeepCache against a U-Net that is walked through block by block, and against exact counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from studio_state.errors import SpecError
from tests.methods.drawing import LABEL, OWN, broken_off, condition, draw, drawing_session, same_pictures
from workers.families.class_pipeline import ClassConditionalPipeline
from workers.families.diffusion_model import DiffusionModel
from workers.mechanisms.denoising import Denoising
from workers.policies.denoise.deepcache import DeepCache

STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@contextmanager
def calls(module: Any) -> Iterator[list[int]]:
    """How often a module ran."""
    seen = [0]

    def count(*_: Any) -> None:
        seen[0] += 1

    handle = module.register_forward_hook(count)
    try:
        yield seen
    finally:
        handle.remove()


def walked(net: Any, x: Tensor, t: Tensor, labels: Tensor, kept: dict[str, Tensor], whole: bool) -> Tensor:
    """The studio's tiny U-Net by hand: two blocks a side; below the outer ones all is computed, or taken from ``kept``."""
    emb = net.time_embedding(net.time_proj(t.expand(len(x))).to(x.dtype)) + net.class_embedding(labels)
    x = net.conv_in(x)
    skips = [x]
    x, outer = net.down_blocks[0](hidden_states=x, temb=emb)
    skips += outer  # one layer's, and the downsampled
    if whole:
        x, inner = net.down_blocks[1](hidden_states=x, temb=emb)
        x = net.mid_block(x, emb)
        kept["deep"] = net.up_blocks[0](x, (skips[-1], *inner), emb)
    x = net.up_blocks[1](kept["deep"], (skips[0], skips[1]), emb)
    return net.conv_out(net.conv_act(net.conv_norm_out(x)))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("interval", [2, 3])
def test_pictures_equal_a_walk_through_the_blocks(folder: Path, interval: int, guidance: float) -> None:
    session = drawing_session(OWN, folder)
    trace = draw(session, DeepCache(interval=interval), seeds=(5,), guidance=guidance)
    pipeline: Any = session.model.pipeline
    net, scheduler = pipeline.unet, pipeline.scheduler
    x = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(5))
    scheduler.set_timesteps(STEPS)
    kept: dict[str, Tensor] = {}
    with torch.inference_mode():
        for n, t in enumerate(scheduler.timesteps):
            rows = 2 if guidance > 1 else 1
            labels = torch.tensor([3, LABEL] if guidance > 1 else [LABEL])
            out = walked(net, scheduler.scale_model_input(x, t).repeat(rows, 1, 1, 1), t, labels, kept, n % interval == 0)
            if guidance > 1:
                without, with_class = out.chunk(2)
                out = without + guidance * (with_class - without)
            x = scheduler.step(out, t, x).prev_sample
    torch.testing.assert_close(trace.drawn[0], (x[0] / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=0)


def walked_through_three(net: Any, x: Tensor, t: Tensor, words: Tensor, kept: dict[str, Tensor], branch: int | None) -> Tensor:
    """The tiny Stable Diffusion's by hand; ``branch`` = None: all is computed.

    Down blocks give two, two and one skip; with the first convolution's that is six, two for each up block.
    """
    emb = net.time_embedding(net.time_proj(t.expand(len(x))).to(x.dtype))
    told = {"temb": emb, "encoder_hidden_states": words}
    c = net.conv_in(x)
    x, (a, b) = net.down_blocks[0](c, **told)
    if branch != 0:
        x, (d, e) = net.down_blocks[1](x, **told)
        if branch is None:
            x, (f,) = net.down_blocks[2](x, temb=emb)
            x = net.mid_block(x, emb, encoder_hidden_states=words)
            kept["deep of 1"] = net.up_blocks[0](x, (e, f), emb)
        x = kept["deep of 0"] = net.up_blocks[1](kept["deep of 1"], (b, d), **told)
        if branch is None:
            kept["deep of full"] = x
    x = net.up_blocks[2](kept["deep of full"] if branch == 0 else x, (c, a), **told)
    return net.conv_out(net.conv_act(net.conv_norm_out(x)))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("branch", [0, 1])
def test_pictures_of_texts_equal_a_walk_through_the_blocks(folder: Path, branch: int, guidance: float) -> None:
    session = drawing_session("stable-diffusion", folder)
    trace = draw(session, DeepCache(interval=3, branch=branch), guidance=guidance)
    pipeline: Any = session.model.pipeline
    net, vae, scheduler = pipeline.unet, pipeline.vae, pipeline.scheduler
    x = torch.cat([torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(s)) for s in (5, 6)])
    scheduler.set_timesteps(STEPS)
    kept: dict[str, Tensor] = {}
    with torch.inference_mode():
        words, none = pipeline.encode_prompt(["a red boat"] * 2, "cpu", 1, True)
        words = torch.cat([none, words]) if guidance > 1 else words
        for n, t in enumerate(scheduler.timesteps):
            taken = x.repeat(len(words) // 2, 1, 1, 1)
            out = walked_through_three(net, taken, t, words, kept, branch if n % 3 else None)
            if guidance > 1:
                without, with_text = out.chunk(2)
                out = without + guidance * (with_text - without)
            x = scheduler.step(out, t, x).prev_sample
        expected = vae.decode(x / vae.config.scaling_factor).sample
    torch.testing.assert_close(torch.stack(trace.drawn), (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


# -- numbers worked by hand ------------------------------------------------------------------
class Down(nn.Module):
    """factor * x, and the same as a skip connection."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = self.factor * hidden_states
        return x, (x,)


class Up(Down):
    """factor * x, and the skip connection on top."""

    def forward(self, hidden_states: Tensor, skips: tuple[Tensor, ...] = ()) -> Any:
        return self.factor * hidden_states + sum(skips)


class Lines(nn.Module):
    """A U of three blocks a side, one number each."""

    denoiser_name = "denoiser"

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = nn.Module()
        self.denoiser.down_blocks = nn.ModuleList([Down(2.0), Down(3.0), Down(5.0)])
        self.denoiser.mid_block = Up(7.0)
        self.denoiser.up_blocks = nn.ModuleList([Up(1.0), Up(1.0), Up(1.0)])

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self.denoiser
        skips: tuple[Tensor, ...] = ()
        for block in net.down_blocks:
            x, more = block(x)
            skips += more
        x = net.mid_block(x)
        for block in net.up_blocks:
            x, skips = block(x, skips[-1:]), skips[:-1]
        return x


@pytest.mark.parametrize(
    ("branch", "numbers", "share"),
    [  # 2x, 6x and 30x are skips; the middle gives 210x, the up path 240x, 246x, 248x
        (0, [248, 246 + 4, 3 * 248, 3 * 246 + 8], 5 / 7),
        (1, [248, 240 + 12 + 4, 3 * 248, 3 * 240 + 24 + 8], 3 / 7),
        (2, [248, 210 + 60 + 12 + 4, 3 * 248, 3 * 210 + 120 + 24 + 8], 1 / 7),
    ],
)
def test_a_u_of_numbers_worked_by_hand(folder: Path, branch: int, numbers: list[float], share: float) -> None:
    session = replace(drawing_session(OWN, folder), model=Lines(), acted={}, counts={})
    state, out = Denoising(of=4), []
    policy = DeepCache(interval=2, branch=branch)
    with torch.inference_mode(), session.having(denoising=state), policy.attach(session):
        for x in (1.0, 2.0, 3.0, 4.0):
            out.append(float(session.model(torch.full((1, 1), x))))
            state.step += 1
    assert out == numbers
    assert state.reused == pytest.approx([0, share, 0, share])
    assert (session.counts, session.acted) == ({"cache_hits": 2}, {"deepcache": 2})


# -- blocks of another form ------------------------------------------------------------------
@contextmanager
def overwritten(net: Any, interval: int) -> Iterator[None]:
    """All blocks run; what the last inner one gives is overwritten between the full steps. For branch = 0."""
    calls, kept = [0], {}

    def hook(module: Any, args: Any, out: Any) -> Any:
        calls[0] += 1
        if (calls[0] - 1) % interval == 0:
            kept["deep"] = out
        return kept["deep"]

    handle = net.up_blocks[-2].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_blocks_that_give_more_than_a_state_and_skips(folder: Path) -> None:
    """A third value of those with a skip of pixels; its sizes do not matter where nobody reads it."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 32, 32),
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        num_class_embeds=4,
    )
    pipeline = ClassConditionalPipeline(unet=net.eval(), scheduler=diffusers.DDIMScheduler())
    session = replace(drawing_session(OWN, folder), model=DiffusionModel(pipeline), acted={}, counts={})
    pipeline.set_progress_bar_config(disable=True)
    with overwritten(net, 3):
        expected = draw(session)
    assert same_pictures(draw(session, DeepCache(interval=3)), expected)
    assert not same_pictures(draw(session), expected)


@pytest.mark.parametrize("kind", [OWN, "stable-diffusion"])
def test_inner_blocks_run_at_full_steps_only(folder: Path, kind: str) -> None:
    session = drawing_session(kind, folder)
    net: Any = session.model.denoiser
    count = len(net.down_blocks)
    for branch in range(count):
        with calls(net.mid_block.resnets[0]) as middle, calls(net.down_blocks[-1].resnets[0]) as last:
            trace = draw(session, DeepCache(interval=3, branch=branch))
        full = 3  # steps 0, 3, 6
        assert middle == [full]
        assert last == [full if branch < count - 1 else STEPS]
        assert trace.counts["cache_hits"] == STEPS - full
        reused = trace.results[0].data["reused"]
        assert [share > 0 for share in reused] == [n % 3 != 0 for n in range(STEPS)]
        assert 0 < reused[1] < 1


def test_every_step_full_is_the_baseline(folder: Path) -> None:
    for kind in (OWN, "stable-diffusion"):
        session = drawing_session(kind, folder)
        plain = draw(session)
        assert same_pictures(plain, draw(session, DeepCache(interval=1)))
        assert not same_pictures(plain, draw(session, DeepCache(interval=4)))
        assert same_pictures(plain, draw(session))
        assert "cache_hits" not in plain.counts


def test_nothing_is_kept_from_one_batch_to_the_next(folder: Path) -> None:
    session = drawing_session(OWN, folder)
    alone = draw(session, DeepCache(interval=3), seeds=(9,))
    draw(session, DeepCache(interval=3), seeds=(1, 2))
    assert same_pictures(alone, draw(session, DeepCache(interval=3), seeds=(9,)))


def test_everything_is_put_back(folder: Path) -> None:
    session = drawing_session(OWN, folder)
    before = condition(session)
    draw(session, DeepCache(interval=3))
    assert condition(session) == before
    with pytest.raises(KeyboardInterrupt):
        broken_off(session, DeepCache(interval=3))
    assert condition(session) == before


def test_a_branch_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"branch = 2, but the U-Net of .* has 2 blocks a side; choose 0 to 1"):
        draw(drawing_session(OWN, folder), DeepCache(branch=2))
