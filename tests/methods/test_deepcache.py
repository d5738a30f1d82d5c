"""DeepCache against a U-Net that is walked through block by block, and against exact counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from studio_state.errors import SpecError
from tests.methods.drawing import LABEL, OWN, broken_off, condition, draw, drawing_session, same_pictures
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
