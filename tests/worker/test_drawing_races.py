"""Races of diffusion pipelines as the engine runs them: the same seeds in every lane, bad input in one sentence."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from studio_state.events import Event, Failed, Output, Preview
from studio_state.experiment import ExperimentSpec
from studio_state.metrics import METRICS
from studio_state.results import Results, results_of
from tests.tiny_diffusion import build_pipeline
from workers.engine import run

FAST = {"steps": 4, "items": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


def race(folder: Path, options: dict[str, Any], *lanes: str, **more: Any) -> tuple[list[Event], Results]:
    """All events of a race, and what came of it."""
    from studio_state.pipeline import parse_pipeline

    spec = ExperimentSpec(
        model=str(folder),
        workload={"id": "generate-images", "options": options},  # type: ignore[arg-type]
        lanes=tuple(parse_pipeline(x) for x in lanes),
        threads=1,
        **more,
    )
    events = list(run(spec))
    return events, results_of(events)


def outputs(events: list[Event]) -> list[Output]:
    return [e for e in events if isinstance(e, Output)]


@pytest.mark.parametrize(
    ("kind", "prompts"),
    [("dit", "1\n7"), ("own-latent", "house\n2"), ("stable-diffusion", "a red boat"), ("flux", "a blue house")],
)
def test_every_kind_of_pipeline_races(kind: str, prompts: str, folders: Path) -> None:
    size = 16 if kind == "flux" else 0  # its own is 256 whatever its parts are
    events, results = race(build_pipeline(kind, folders), {**FAST, "prompts": prompts, "size": size})
    assert events[-1].event == "finished", events[-1]
    values = {name: results.lanes[0].value(name) or 0.0 for name in results.lanes[0].sources}
    assert values["denoising_steps"] == 4
    assert values["denoiser_calls"] == 4
    assert values["same_output"] == 1
    assert values["ssim"] == pytest.approx(1, abs=1e-5)
    assert values["seconds_per_image"] > 0
    assert "psnr" not in values  # of equal pictures there is none
    assert set(values) <= set(METRICS)
    drawn = outputs(events)
    assert [o.kind for o in drawn] == ["image", "image"]
    for o in drawn:
        assert Image.open(io.BytesIO(base64.b64decode(o.data["image"]))).size == (16, 16)
    told = [(e.item, e.step, e.of) for e in events if isinstance(e, Preview)]
    if kind == "flux":  # packed latents are no picture
        assert told == []
    else:
        assert told == [(f"picture-{i}", n, 4) for i in range(2) for n in (1, 2, 3)]


def test_a_batch_draws_what_single_pictures_are(folders: Path) -> None:
    folder = build_pipeline("dit", folders)
    single, _ = race(folder, {**FAST, "items": 3})
    together, _ = race(folder, {**FAST, "items": 3}, batch=3)
    for a, b in zip(outputs(single), outputs(together), strict=True):
        first, second = (Image.open(io.BytesIO(base64.b64decode(o.data["image"]))) for o in (a, b))
        assert a.item == b.item
        gap = max(abs(x - y) for x, y in zip(first.tobytes(), second.tobytes(), strict=True))
        assert gap <= 1  # rounding of a pass of three rows


def test_seeds_follow_the_experiment(folders: Path) -> None:
    folder = build_pipeline("dit", folders)
    first, again, other = (outputs(race(folder, {**FAST, "prompts": "3"}, seed=s)[0]) for s in (5, 5, 6))
    assert [o.data["image"] for o in first] == [o.data["image"] for o in again]
    assert first[1].data["image"] == other[0].data["image"]  # the second picture of seed 5 has seed 6
    assert first[0].data["image"] != other[0].data["image"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompts": "2\nunicorn"}, "1 label is no class of this model: 'unicorn'"),
        ({"steps": 0}, "steps = 0 is not allowed; allowed: a whole number from 1 to 1000"),
        ({"steps": 10_000}, "steps = 10000 is not allowed; allowed: a whole number from 1 to 1000"),
        ({"size": 64}, "the size of this model's pictures is fixed; leave size at 0"),
        ({"guidance": -1.0}, "guidance = -1.0 is not allowed"),
    ],
)
def test_bad_input_is_one_sentence(options: dict[str, Any], sentence: str, folders: Path) -> None:
    events, _ = race(build_pipeline("dit", folders), options)
    last = events[-1]
    assert isinstance(last, Failed)
    assert sentence in last.message


@pytest.mark.parametrize(
    ("kind", "scheduler", "sentence"),
    [
        ("sd3", "NoSuchScheduler", "names the scheduler 'NoSuchScheduler', which diffusers"),
        ("sd3", "DDIMScheduler", "which is made for flow matching, with DDIMScheduler, a scheduler for noise prediction"),
        ("dit", "FlowMatchEulerDiscreteScheduler", "which is made for noise prediction, with FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_a_pipeline_for_another_scheduler_is_refused(
    kind: str, scheduler: str, sentence: str, folders: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(build_pipeline(kind, folders), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", scheduler]
    (folder / "model_index.json").write_text(json.dumps(index))
    events, _ = race(folder, FAST)
    last = events[-1]
    assert isinstance(last, Failed)
    assert sentence in last.message


def test_another_family_is_told_what_it_cannot_run(folders: Path) -> None:
    folder = build_pipeline("dit", folders)
    events = list(run(ExperimentSpec(model=str(folder), workload={"id": "needle"}, threads=1)))  # type: ignore[arg-type]
    last = events[-1]
    assert isinstance(last, Failed)
    assert "is of family diffusion" in last.message
