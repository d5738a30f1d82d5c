"""Recipes on toys: stopped and taken up again they end in the same bits, whatever stops them; and what is refused."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import shlex
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from studio_state.errors import SpecError
from studio_state.events import Event, decode
from tests.sampling import first
from workers.data.fashion import held_out
from workers.models.info import model_info
from workers.models.resolve import resolve
from workers.recipe import Trained, make_recipe
from workers.session import Cancelled
from workers.train import JOB
from workers.training.loop import UNFINISHED, TrainingRun

VIT = {"steps": 6, "layers": 1, "width": 32, "batch_size": 8}
VLM = {
    "see_steps": 3,
    "steps": 4,
    "relate_steps": 3,
    "compare_steps": 2,
    "decide_steps": 2,
    "batch_size": 2,
    "layers": 2,
    "width": 64,
}
CLIPS = {"score_steps": 2, "steps": 2, "long_steps": 2, "batch_size": 2}
CLI = {**VIT, "steps": 1500}
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training files in the published form, from the images that ship with the studio."""
    folder = tmp_path_factory.mktemp("fashion")
    for name, values in zip(("images-idx3", "labels-idx1"), held_out(), strict=True):
        few = values[:200]
        head = bytes([0, 0, 8, few.ndim]) + struct.pack(f">{few.ndim}I", *few.shape)
        (folder / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(head + few.tobytes()))
    return folder


def knobs_of(name: str, data: Path) -> dict[str, Any]:
    return {**VIT, "data": str(data)} if name == "fashion-vit" else CLIPS if name == "scene-vlm-clips" else VLM


def train(name: str, data: Path, out: Path, seed: int = 0, stop_at: int | None = None) -> tuple[Trained, list[str]]:
    """Train a toy, cancelled at the so-manieth question whether to go on; also what it told."""
    asked, told = itertools.count(), []  # type: itertools.count[int], list[str]

    def is_cancelled() -> bool:
        return next(asked) == stop_at

    run = TrainingRun(out, seed, lambda text, done: told.append(text), is_cancelled, examples=12)
    return make_recipe(name, knobs_of(name, data)).train(run), told


def bits(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module", params=["fashion-vit", "scene-vlm", "scene-vlm-clips"])
def whole(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A recipe, and the folder of its toy that was never interrupted."""
    out = tmp_path_factory.mktemp(request.param)
    train(request.param, data, out)
    return request.param, out


# -- stopping and going on


def test_stopped_and_taken_up_again_it_ends_in_the_same_bits(whole: tuple[str, Path], data: Path, tmp_path: Path) -> None:
    name, out = whole
    with pytest.raises(Cancelled):
        train(name, data, tmp_path, stop_at=2)
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(Cancelled):
        train(name, data, tmp_path, stop_at=0)
    train(name, data, tmp_path)
    assert bits(tmp_path) == bits(out)


def test_a_later_phase_does_not_train_an_earlier_one_again(data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train("scene-vlm", data, whole)
    with pytest.raises(Cancelled):
        train("scene-vlm", data, parts, stop_at=VLM["see_steps"] + 2)
    seen = (parts / UNFINISHED / "see.pt").read_bytes()
    trained, told = train("scene-vlm", data, parts)
    assert not [text for text in told if text.startswith("see:")]
    assert any(text.startswith("answer: step 4 of 4") for text in told)
    assert (parts / UNFINISHED / "see.pt").read_bytes() == seen
    assert bits(parts) == bits(whole)
    assert trained.steps == {"see": 3, "answer": 4, "relate": 3, "compare": 2, "decide": 2}
    assert min(trained.seconds.values()) >= 0
    assert list(trained.seconds) == list(trained.steps)


def test_stopped_while_it_scores_it_only_scores_again(whole: tuple[str, Path], data: Path, tmp_path: Path) -> None:
    name, out = whole
    steps = sum(v for k, v in knobs_of(name, data).items() if k.endswith("steps"))
    with pytest.raises(Cancelled):
        train(name, data, tmp_path, stop_at=steps)
    trained, told = train(name, data, tmp_path)
    assert told
    assert all(text.startswith("scoring") for text in told)
    assert trained.examples == 12
    assert bits(tmp_path) == bits(out)


def test_the_seed_decides_the_weights(whole: tuple[str, Path], data: Path, tmp_path: Path) -> None:
    name, out = whole
    train(name, data, tmp_path / "same")
    train(name, data, tmp_path / "other", seed=1)
    assert bits(tmp_path / "same") == bits(out)
    part = "scorer" if name == "scene-vlm-clips" else ""  # its language model begins as it was trained before
    mine, theirs = (load_file(folder / part / "model.safetensors") for folder in (out, tmp_path / "other"))
    assert mine.keys() == theirs.keys()
    trained = [k for k in mine if not k.startswith("vision_model")]  # which stays fixed
    assert sum(not torch.equal(mine[k], theirs[k]) for k in trained) > len(trained) / 2


def test_every_step_has_random_numbers_of_its_own() -> None:
    def drawn(seed: int, phase: str, step: int) -> float:
        return float(TrainingRun(Path(), seed).rng(phase, step).random())

    places = list(itertools.product((0, 1), ("see", "answer"), (0, 1, 2)))
    assert len({drawn(*place) for place in places}) == len(places)
    assert [drawn(*place) for place in places] == [drawn(*place) for place in places]


def test_what_is_handed_over_is_a_model_of_the_studio(whole: tuple[str, Path]) -> None:
    name, out = whole
    info = model_info(resolve(str(out)))
    assert info.family == name.split("-")[1]
    trained = Trained.model_validate_json((out / "training.json").read_bytes())
    assert (trained.recipe, trained.seed, trained.examples) == (name, 0, 12)
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in load_file(out / "model.safetensors").values())


# -- the worker's side


def worker(out: Path, recipe: str, knobs: dict[str, Any], **more: Any) -> tuple[int, list[Event]]:
    """One request to the worker, in this process."""
    stream = io.StringIO()
    request = {"recipe": recipe, "out": str(out), "knobs": knobs, "threads": 1, **more}
    status = JOB.run(json.dumps({**request, "examples": 12}), stream)
    return status, [decode(line) for line in stream.getvalue().splitlines()]


def refusal(out: Path, recipe: str = "scene-vlm", knobs: dict[str, Any] = VLM, **more: Any) -> str:
    """Its sentence; nothing in the folder may have changed."""
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    status, events = worker(out, recipe, knobs, **more)
    assert (status, [getattr(e, "event", "") for e in events]) == (2, ["failed"])
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    return str(getattr(events[0], "message", ""))


def test_a_folder_with_an_unfinished_training_takes_no_other(data: Path, tmp_path: Path) -> None:
    (tmp_path / UNFINISHED).mkdir()
    begun = {"recipe": "scene-vlm", "knobs": make_recipe("scene-vlm", VLM).model_dump(), "seed": 0}
    (tmp_path / UNFINISHED / "recipe.json").write_text(json.dumps(begun))
    with pytest.raises(Cancelled):
        train("scene-vlm", data, tmp_path, stop_at=1)
    held = f"{tmp_path} holds an unfinished training with"
    again = "give the same again, or another folder"
    assert refusal(tmp_path, seed=3) == f"{held} seed 0, not 3; {again}"
    assert refusal(tmp_path, knobs={**VLM, "steps": 5}) == f"{held} steps 4, not 5; {again}"
    assert refusal(tmp_path, "fashion-vit", VIT) == f"{held} recipe scene-vlm, not fashion-vit; {again}"
    with FileLock(tmp_path / UNFINISHED / "lock"):
        assert refusal(tmp_path) == f"another process trains into {tmp_path}; wait for it, or choose another folder"
    status, events = worker(tmp_path, "scene-vlm", VLM)
    assert (status, getattr(events[-1], "event", "")) == (0, "finished")
    assert getattr(events[0], "text", "") == f"going on with what is unfinished in {tmp_path}"
    assert not (tmp_path / UNFINISHED).exists()


def test_a_folder_with_a_checkpoint_is_not_trained_again(tmp_path: Path) -> None:
    assert worker(tmp_path, "scene-vlm", VLM)[0] == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    status, events = worker(tmp_path, "scene-vlm", {**VLM, "learning_rate": 0.0012})  # the default, said aloud
    assert (status, [getattr(e, "event", "") for e in events]) == (0, ["note", "finished"])
    assert "holds this already: scene-vlm of the same knobs and seed; nothing was done" in getattr(events[0], "text", "")
    held = f"{tmp_path} holds a checkpoint that was trained with"
    assert refusal(tmp_path, seed=1) == f"{held} seed 0, not 1; give another folder"
    assert refusal(tmp_path, "fashion-vit", VIT) == f"{held} recipe scene-vlm, not fashion-vit; give another folder"
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_folder_with_anything_else_is_left_alone(tmp_path: Path) -> None:
    letter = tmp_path / "letters" / "letter.txt"
    letter.parent.mkdir()
    letter.write_text("Dear Ann")
    wanted = f"{tmp_path} holds something else than a checkpoint of scene-vlm; give a new or empty folder"
    assert refusal(tmp_path) == wanted
    letter.unlink()
    (tmp_path / "training.json").write_text('{"torn')
    assert refusal(tmp_path) == wanted
    assert refusal(tmp_path / "training.json") == f"{tmp_path / 'training.json'} is a file; give a new or empty folder"
    (tmp_path / "training.json").unlink()
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / "see.pt").write_bytes(b"of another program")
    assert refusal(tmp_path) == wanted


def test_requests_that_are_none(tmp_path: Path) -> None:
    assert refusal(tmp_path, "nothing").startswith("there is no recipe 'nothing'; allowed: ")
    assert refusal(tmp_path, knobs={"steps": 0}).startswith("scene-vlm: steps: ")
    assert refusal(tmp_path, seed=-1).startswith("this is no request to train: ")
    with pytest.raises(SpecError):
        make_recipe("scene-vlm", {"stesp": 1})


def test_a_failed_start_does_not_bind_the_folder(data: Path, tmp_path: Path) -> None:
    status, events = worker(tmp_path, "fashion-vit", {**VIT, "data": str(tmp_path / "nowhere")})
    assert (status, getattr(events[-1], "phase", "")) == (1, "run")
    assert "train-images-idx3-ubyte.gz is not there" in getattr(events[-1], "message", "")
    assert worker(tmp_path, "fashion-vit", {**VIT, "data": str(data)})[0] == 0


def test_damaged_state_is_told_in_one_sentence(data: Path, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        train("fashion-vit", data, tmp_path, stop_at=1)
    recipe = make_recipe("fashion-vit", knobs_of("fashion-vit", data))
    begun = {"recipe": "fashion-vit", "knobs": recipe.model_dump(), "seed": 0}
    (tmp_path / UNFINISHED / "recipe.json").write_text(json.dumps(begun))
    state = tmp_path / UNFINISHED / "classify.pt"
    state.write_bytes(state.read_bytes()[:1000])
    status, events = worker(tmp_path, "fashion-vit", recipe.model_dump())
    assert status == 1
    assert getattr(events[-1], "message", "") == f"{state} is damaged; delete it to train this part again"


# -- the command


def words(data: Path, out: Path, *more: str, **knobs: Any) -> list[str]:
    chosen = {**CLI, "data": data, **knobs}
    start = ["train", "fashion-vit", "--out", str(out), "--threads", "1"]
    return [*start, *more, *(w for k, v in chosen.items() for w in ("--knob", f"{k}={v}"))]


def test_the_command_trains_and_its_card_names_it(pareto_studio: Start, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "here"
    process = pareto_studio(*words(data, out, "--json", steps=300))
    text, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "classify: step 300 of 300, loss" in said
    record = json.loads(text)
    assert record == json.loads((out / "training.json").read_text())
    assert (record["recipe"], record["knobs"]["steps"], record["examples"]) == ("fashion-vit", 300, 10_000)
    files = {p.name for p in out.iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "training.json"}
    command = next(line for line in (out / "README.md").read_text().splitlines() if "Made again by" in line).split("`")[1]
    assert command == (
        "pareto-studio train fashion-vit --out DIR --seed 0 --threads 1 "
        "--knob steps=300 --knob batch_size=8 --knob layers=1 --knob width=32"
    )
    before = bits(out)
    again = [str(out) if w == "DIR" else w for w in shlex.split(command)[1:]]
    process = pareto_studio(*again, "--knob", f"data={data}")
    text, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "holds this already" in said
    assert f"use it with --model {out}" in text
    assert bits(out) == before


@pytest.mark.parametrize("number", first(1, signal.SIGINT, signal.SIGTERM))
def test_ctrl_c_keeps_the_state_and_the_same_command_goes_on(
    pareto_studio: Start, data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = pareto_studio(*words(data, out))
    begun = out / UNFINISHED / "recipe.json"
    deadline = time.monotonic() + 90
    while not begun.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert f"the state is kept in {out / UNFINISHED}; the same command goes on from there" in said
    assert "Traceback" not in said
    assert (out / UNFINISHED / "classify.pt").is_file()
    process = pareto_studio(*words(data, out, "--seed", "5"))
    assert f"{out} holds an unfinished training with seed 0, not 5" in process.communicate(timeout=60)[1]
    assert process.returncode == 2
    process = pareto_studio(*words(data, out))
    text, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "going on with what is unfinished" in said
    assert "accuracy" in text
    assert not (out / UNFINISHED).exists()
    assert json.loads((out / "training.json").read_text())["steps"] == {"classify": CLI["steps"]}


def test_a_worker_that_nobody_listens_to_stops_with_its_state(pareto_studio: Start, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = pareto_studio(*words(data, out, steps=1_000_000))
    deadline = time.monotonic() + 90
    while not (out / UNFINISHED / "recipe.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)
    while not (out / UNFINISHED / "classify.pt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with FileLock(out / UNFINISHED / "lock", timeout=30):  # the worker let go of the folder
        assert os.listdir(out) == [UNFINISHED]


def test_the_command_refuses_with_status_2(pareto_studio: Start, data: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear Ann")
    for arguments, sentence in (
        (["train", "fashion-vti", "--out", str(tmp_path)], "there is no recipe 'fashion-vti'; did you mean 'fashion-vit'?"),
        (words(data, tmp_path, steps=0), "fashion-vit: steps = 0 is not allowed"),
        (words(data, tmp_path), f"{tmp_path} holds something else than a checkpoint of fashion-vit"),
    ):
        process = pareto_studio(*arguments)
        text, said = process.communicate(timeout=60)
        assert (process.returncode, text, len(said.splitlines())) == (2, "", 1), said
        assert said.startswith(sentence)
