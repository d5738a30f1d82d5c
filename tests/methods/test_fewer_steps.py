"""Fewer steps against runs that were asked for so few."""

from __future__ import annotations

from pathlib import Path

import pytest

from studio_state.events import LaneFinished
from studio_state.experiment import ExperimentSpec
from studio_state.pipeline import parse_pipeline
from tests.methods.drawing import OWN, broken_off, condition, draw, drawing_session, pipeline_folder, same_pictures
from tests.tiny_diffusion import build_pipeline
from workers.engine import run
from workers.policies.denoise.fewer_steps import FewerSteps

KINDS = (OWN, "dit", "stable-diffusion", "pixart", "sd3", "flux")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_eight_is_a_run_of_four(kind: str, folders: Path) -> None:
    session, four = drawing_session(kind, folders), drawing_session(kind, folders, steps=4)
    got, expected = draw(session, FewerSteps()), draw(four)
    assert same_pictures(got, expected)
    assert got.counts == expected.counts
    assert (got.counts["denoising_steps"], got.counts["denoiser_calls"]) == (4, 4)
    assert session.acted == {"fewer-steps": 4}
    assert session.step_share == 1


@pytest.mark.parametrize(
    ("keep", "asked", "runs"), [(0.05, 8, 1), (0.05, 1, 1), (0.3, 8, 2), (0.9, 8, 7), (0.95, 8, 8), (0.25, 20, 5)]
)
def test_the_share_is_rounded_and_one_step_runs_at_least(keep: float, asked: int, runs: int, folders: Path) -> None:
    session = drawing_session("dit", folders, steps=asked)
    assert draw(session, FewerSteps(keep=keep), seeds=(5,)).counts["denoising_steps"] == runs
    assert session.acted.get("fewer-steps", 0) == asked - runs


def test_all_steps_are_the_model_itself(folders: Path) -> None:
    session = drawing_session(OWN, folders)
    assert same_pictures(draw(session, FewerSteps(keep=1.0)), draw(session))
    assert session.acted == {}


def test_a_scheduler_of_the_second_order(folders: Path, tmp_path: Path) -> None:
    """Its n steps run the denoiser 2n - 1 times."""
    from diffusers import DiTPipeline, HeunDiscreteScheduler

    whole = DiTPipeline.from_pretrained(build_pipeline("dit", folders))
    whole.scheduler = HeunDiscreteScheduler()
    whole.register_modules(scheduler=whole.scheduler)
    whole.save_pretrained(tmp_path / "dit")
    session = drawing_session("dit", tmp_path)
    got = draw(session, FewerSteps(), seeds=(5,))
    assert same_pictures(got, draw(drawing_session("dit", tmp_path, steps=4), seeds=(5,)))
    assert got.counts["denoiser_calls"] == 2 * 4 - 1
    assert session.acted == {"fewer-steps": 4}


def test_everything_is_undone(folders: Path) -> None:
    session = drawing_session("dit", folders)
    before, pictures = condition(session), draw(session)
    draw(session, FewerSteps())
    assert condition(session) == before
    with pytest.raises(KeyboardInterrupt):
        broken_off(session, FewerSteps())
    assert condition(session) == before
    assert same_pictures(draw(session), pictures)


def test_too_few_steps_for_the_share_are_flagged(folders: Path) -> None:
    spec = ExperimentSpec(
        model=str(pipeline_folder("dit", folders)),
        workload={"id": "generate-images", "options": {"steps": 4, "items": 1, "prompts": "1"}},  # type: ignore[arg-type]
        lanes=(parse_pipeline("fewer-steps:keep=0.9"), parse_pipeline("fewer-steps")),
        threads=1,
    )
    flags = [e.flags for e in run(spec) if isinstance(e, LaneFinished)]
    assert flags == [[], ["no effect: Fewer steps left out no step: 0.9 of 4 rounds to 4; lower keep or ask for more steps"], []]
