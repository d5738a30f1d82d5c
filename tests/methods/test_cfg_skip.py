"""Guidance skipping against sampling loops written by hand, with their own arithmetic of guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from studio_state.pipeline import parse_pipeline
from studio_state.problems import pipeline_problems
from tests.methods.drawing import LABEL, OWN, broken_off, condition, draw, drawing_session, same_pictures, sizes_seen
from workers.mechanisms.denoising import Denoising
from workers.mechanisms.guidance import conditional_half, guided_steps
from workers.methods import catalogue
from workers.policies.denoise.cfg_skip import GuidanceSkipping
from workers.session import Session

STEPS, GUIDANCE, SEEDS = 8, 3.0, (5, 6)
BY_HAND = (OWN, "stable-diffusion", "dit")  # unconditional first, unconditional first, conditional first
FULL = {  # (keep, where) -> steps of eight with full guidance
    (0.5, "first"): {0, 1, 2, 3},
    (0.5, "middle"): {2, 3, 4, 5},
    (0.5, "every"): {0, 2, 4, 6},
    (0.375, "every"): {0, 2, 5},
    (0.375, "middle"): {2, 3, 4},
    (0.05, "first"): {0},
    (0.05, "middle"): {3},
    (0.05, "every"): {0},
    (0.95, "first"): set(range(8)),
    (0.9, "every"): set(range(7)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


# -- by hand ---------------------------------------------------------------------------------
def noise(session: Session) -> Tensor:
    config: Any = session.model.denoiser.config  # type: ignore[union-attr]
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in SEEDS])


def decoded(session: Session, latents: Tensor, by_class: bool) -> Tensor:
    """Pictures; DiTPipeline multiplies where the other divides, which rounds differently."""
    vae: Any = getattr(session.model.pipeline, "vae", None)  # type: ignore[union-attr]
    if vae is not None:
        factor = vae.config.scaling_factor
        latents = vae.decode(latents * (1 / factor) if by_class else latents / factor).sample
    return (latents / 2 + 0.5).clamp(0, 1)


def asker(session: Session, kind: str) -> Callable[[Tensor, Any, list[bool]], Tensor]:
    """A function of (latents [n B, ...], timestep, which halves are conditional) that runs the denoiser itself."""
    pipeline: Any = session.model.pipeline  # type: ignore[union-attr]
    if kind == "stable-diffusion":
        told, empty = pipeline.encode_prompt(["a red boat"] * 2, "cpu", 1, True)

        def ask(x: Tensor, t: Any, halves: list[bool]) -> Tensor:
            words = torch.cat([told if conditional else empty for conditional in halves])
            return pipeline.unet(x, t, encoder_hidden_states=words).sample  # type: ignore[no-any-return]
    else:
        denoiser, none = (pipeline.transformer, 1000) if kind == "dit" else (pipeline.unet, 3)

        def ask(x: Tensor, t: Any, halves: list[bool]) -> Tensor:
            labels = torch.tensor([LABEL if conditional else none for conditional in halves for _ in SEEDS])
            found: Tensor = denoiser(x, timestep=t.expand(len(x)), class_labels=labels).sample
            return found[:, : denoiser.config.in_channels]

    return ask


@torch.inference_mode()
def by_hand(session: Session, kind: str, full: set[int], then: str) -> Tensor:
    """Pictures [B, C, H, W]. The batches are those of the policy, so that not even rounding differs."""
    scheduler: Any = session.model.pipeline.scheduler  # type: ignore[union-attr]
    ask, x, difference = asker(session, kind), noise(session), None
    order = [True, False] if kind == "dit" else [False, True]
    scheduler.set_timesteps(STEPS)
    for i, t in enumerate(scheduler.timesteps):
        if i in full:
            parts = ask(torch.cat([x, x]), t, order).chunk(2)
            with_class, without = parts if order[0] else parts[::-1]
            difference = with_class - without
        else:
            with_class = ask(x, t, [True])
            without = with_class if then == "none" or difference is None else with_class - difference
        x = scheduler.step(without + GUIDANCE * (with_class - without), t, x).prev_sample
    return decoded(session, x, kind == "dit")


@pytest.mark.parametrize("kind", BY_HAND)
def test_the_hand_written_loop_is_the_pipelines(kind: str, folders: Path) -> None:
    session = drawing_session(kind, folders)
    expected = by_hand(session, kind, set(range(STEPS)), "none")
    for picture, hand in zip(draw(session).drawn, expected, strict=True):
        assert torch.equal(picture, hand)


@pytest.mark.parametrize("then", ["reuse", "none"])
@pytest.mark.parametrize("where", ["first", "middle", "every"])
@pytest.mark.parametrize("kind", BY_HAND)
def test_pictures_equal_the_hand_written_loops(kind: str, where: Any, then: Any, folders: Path) -> None:
    session = drawing_session(kind, folders)
    trace = draw(session, GuidanceSkipping(keep=0.375, where=where, then=then))
    full = {"first": {0, 1, 2}, "middle": {2, 3, 4}, "every": {0, 2, 5}}[where]
    for picture, hand in zip(trace.drawn, by_hand(session, kind, full, then), strict=True):
        assert torch.equal(picture, hand)
    assert not same_pictures(trace, draw(session))
    assert trace.counts["guided_steps"] == 3
    assert session.acted == {"cfg-skip": 5}


def test_the_two_ways_differ(folders: Path) -> None:
    session = drawing_session(OWN, folders)
    ways = [draw(session, GuidanceSkipping(then=then)) for then in ("reuse", "none")]
    assert not same_pictures(*ways)


@pytest.mark.parametrize(("knobs", "full"), FULL.items(), ids=str)
def test_steps_with_guidance_by_hand(knobs: tuple[float, Any], full: set[int], folders: Path) -> None:
    keep, where = knobs
    assert guided_steps(where, keep, STEPS) == full
    session = drawing_session("dit", folders)
    with sizes_seen(session.model.denoiser.pos_embed) as rows:  # type: ignore[union-attr]
        trace = draw(session, GuidanceSkipping(keep=keep, where=where))
    assert rows == [4 if step in full else 2 for step in range(STEPS)]
    assert trace.counts["guided_steps"] == len(full)
    assert session.acted.get("cfg-skip", 0) == STEPS - len(full)


def test_all_lengths_keep_the_share() -> None:
    for of in range(1, 60):
        for keep in (0.05, 0.3, 0.5, 0.77, 1.0):
            for where in ("first", "middle", "every"):
                steps = guided_steps(where, keep, of)
                assert len(steps) == max(1, round(keep * of))
                assert steps <= set(range(of))


@contextmanager
def second_guess(session: Session, full: set[int]) -> Iterator[None]:
    """Run both halves at every step, and put the conditional one in the other's place where guidance is left out."""

    def hook(module: Any, args: Any, out: Any) -> Any:
        state = session.denoising
        assert state is not None
        if state.step in full:
            return None
        conditional = out[0].chunk(2)[1]
        return (torch.cat([conditional, conditional]),)

    handle = session.model.denoiser.register_forward_hook(hook)  # type: ignore[union-attr, operator]
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["pixart", "sd3"])
def test_other_pipelines_and_learned_variances(kind: str, folders: Path) -> None:
    """Their halves run in batches of another size here than there, which rounds differently."""
    session = drawing_session(kind, folders)
    with second_guess(session, {2, 3, 4, 5}):
        expected = draw(session)
    with sizes_seen(session.model.denoiser.pos_embed) as rows:  # type: ignore[union-attr]
        got = draw(session, GuidanceSkipping(where="middle"))
    assert rows == [2, 2, 4, 4, 4, 4, 2, 2]
    for a, b in zip(got.drawn, expected.drawn, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not same_pictures(got, draw(session))


def test_arguments_are_cut_wherever_they_lie() -> None:
    x = torch.arange(8.0).reshape(4, 2)
    state = Denoising(of=1, guided=True, conditional_first=True)
    given = {"text": {"embeds": x, "ids": None}, "more": [x, (x, 3)], "timestep": torch.tensor(7), "table": torch.zeros(3, 4)}
    args, kwargs = conditional_half(((x, "word"), given), state)
    half = x[:2]
    assert torch.equal(args[0], half)
    assert args[1] == "word"
    assert torch.equal(kwargs["text"]["embeds"], half)
    assert kwargs["text"]["ids"] is None
    assert torch.equal(kwargs["more"][0], half)
    assert torch.equal(kwargs["more"][1][0], half)
    assert kwargs["more"][1][1] == 3
    assert kwargs["timestep"] == 7
    assert kwargs["table"].shape == (3, 4)


def test_neutral_is_the_model_itself(folders: Path) -> None:
    session = drawing_session(OWN, folders)
    assert same_pictures(draw(session, GuidanceSkipping(keep=1.0)), draw(session))
    assert session.acted == {}


def test_without_guidance_nothing_happens(folders: Path) -> None:
    session = drawing_session(OWN, folders)
    policy = GuidanceSkipping()
    plain = draw(session, guidance=1.0)
    assert same_pictures(draw(session, policy, guidance=1.0), plain)
    assert session.acted == {}
    assert "guidance is 1; set guidance above 1" in policy.why_idle(session)
    draw(session, GuidanceSkipping(keep=0.99))
    assert session.acted == {}
    assert "lower keep" in policy.why_idle(session)


def test_a_model_without_guidance_is_refused(folders: Path) -> None:
    info = drawing_session("flux", folders).info
    (problem,) = pipeline_problems(parse_pipeline("cfg-skip"), catalogue(), info)
    assert "guided" in problem.message


@pytest.mark.parametrize("then", ["reuse", "none"])
def test_everything_is_undone(then: Any, folders: Path) -> None:
    session, policy = drawing_session("stable-diffusion", folders), GuidanceSkipping(then=then)
    before, pictures = condition(session), draw(session)
    draw(session, policy)
    assert condition(session) == before
    with pytest.raises(KeyboardInterrupt):
        broken_off(session, policy)
    assert condition(session) == before
    assert same_pictures(draw(session), pictures)
