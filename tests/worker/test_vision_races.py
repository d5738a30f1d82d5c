"""Races of models that see, as the engine runs them: every architecture, real pictures, bad input in one sentence."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from studio_state.events import Event, Failed, ImageTokens, Output, Picture
from studio_state.experiment import ExperimentSpec
from studio_state.metrics import METRICS
from studio_state.results import Results, results_of
from tests import tiny_vision
from workers.engine import run

SEEING = ("llava_folder", "llava_next_folder", "smolvlm_folder", "idefics3_folder", "qwen2_5_vl_folder")
ENCODERS = ("vit_folder", "deit_folder", "dinov2_folder", "clip_vision_folder")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def race(folder: Path, workload: str, options: dict[str, Any], *lanes: str, **more: Any) -> tuple[list[Event], Results]:
    """All events of a race, and what came of it."""
    from studio_state.pipeline import parse_pipeline

    spec = ExperimentSpec(
        model=str(folder),
        workload={"id": workload, "options": options},  # type: ignore[arg-type]
        lanes=tuple(parse_pipeline(x) for x in lanes),
        threads=1,
        **more,
    )
    events = list(run(spec))
    return events, results_of(events)


def pictures(folder: Path, count: int = 2) -> Path:
    """A folder of small colourful pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    for i in range(count):
        small = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(np.kron(small, np.ones((9, 9, 1), dtype=np.uint8))).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", SEEING)
def test_every_seeing_architecture_races(name: str, tmp_path: Path) -> None:
    folder = getattr(tiny_vision, name)()
    options = {"source": str(pictures(tmp_path / "p")), "question": "What is it?"}
    lanes = ["random-visual:keep=0.25", "divprune:keep=0.5+knorm:keep=0.5", "fastv:keep=0.5,layer=1"]
    events, results = race(folder, "vqa", options, *lanes, max_new_tokens=4, eos="ignore")
    assert results.status == "finished", results.message
    assert [lane.status for lane in results.lanes] == ["finished"] * 4, [lane.message for lane in results.lanes]
    assert [lane.flags for lane in results.lanes] == [[]] * 4
    all_tokens = results.lanes[0].value("visual_tokens")
    quarter = results.lanes[1].value("visual_tokens")
    assert all_tokens
    assert quarter
    assert quarter < 0.5 * all_tokens
    assert results.lanes[3].value("visual_tokens") == all_tokens  # all enter, some leave inside
    assert (results.lanes[3].value("prefill_kv_bytes") or 0) < (results.lanes[0].value("prefill_kv_bytes") or 0)
    assert {e.name for e in events if e.event == "metric"} <= set(METRICS)  # type: ignore[attr-defined]
    shown = [e for e in events if isinstance(e, Picture)]
    assert len(shown) == 2  # once an item, not once a lane
    assert Image.open(io.BytesIO(base64.b64decode(shown[0].data))).size == (90, 72)
    for e in (e for e in events if isinstance(e, ImageTokens)):
        assert len(e.share) == len(shown[0].boxes) == len(shown[0].views)
        if e.lane == 1:
            assert sum(s > 0 for s, box in zip(e.share, shown[0].boxes, strict=True) if box) <= round(quarter)
            assert len(e.level) == len(e.share)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_races(name: str, tmp_path: Path) -> None:
    folder = getattr(tiny_vision, name)()
    options = {"source": str(pictures(tmp_path / "p", 3))}
    lanes = ["tome:keep=0.5", "attention-prune:keep=0.5,steps=1", "rtn:bits=8,group_size=32", "layer-skip:count=1"]
    events, results = race(folder, "classify", options, *lanes, batch=2)
    assert results.status == "finished", results.message
    assert [lane.status for lane in results.lanes] == ["finished"] * 5, [lane.message for lane in results.lanes]
    assert [lane.flags for lane in results.lanes] == [[]] * 5
    patches = results.lanes[0].value("visual_tokens")
    assert patches
    assert results.lanes[1].value("visual_tokens") == pytest.approx(0.5 * patches, abs=1)
    assert results.lanes[2].value("visual_tokens") == pytest.approx(0.5 * patches, abs=1)
    for lane in results.lanes:
        assert lane.value("images_per_s")
        quality = "kl_to_baseline" if name in ("vit_folder", "deit_folder") else "feature_similarity"
        assert lane.value(quality) is not None
    merged = [e for e in events if isinstance(e, ImageTokens) and e.lane == 1]
    assert all(len(set(e.group)) == round(0.5 * patches) for e in merged)
    labels = [e for e in events if isinstance(e, Output)]
    assert len(labels) == 15


def failed(events: list[Event]) -> str:
    last = events[-1]
    assert isinstance(last, Failed), last
    return last.message


def test_a_text_prompt_without_image_runs_on_a_model_that_sees() -> None:
    events, results = race(
        tiny_vision.llava_folder(), "prompts", {"text": "The quick brown fox"}, "snapkv:keep=0.5", max_new_tokens=4
    )
    assert results.status == "finished", results.message
    assert not [e for e in events if isinstance(e, Picture)]


def test_a_placeholder_typed_into_a_question_is_refused(tmp_path: Path) -> None:
    options = {"source": str(pictures(tmp_path / "p", 1)), "question": "What is <image> it?"}
    events, _ = race(tiny_vision.llava_folder(), "vqa", options)
    assert "placeholder" in failed(events)


def test_text_workloads_are_refused_on_encoders() -> None:
    events, _ = race(tiny_vision.vit_folder(), "prompts", {"text": "hello"})
    assert "family vit" in failed(events)


def test_labels_that_no_class_has_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path / "p" / "zebra")
    events, _ = race(tiny_vision.vit_folder(), "classify", {"source": str(tmp_path / "p")})
    assert "zebra" in failed(events)


@pytest.mark.parametrize("kind", ["grey", "rgba", "turned", "huge"])
def test_unusual_pictures_are_seen_as_people_mean_them(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    rng = np.random.default_rng(0)
    if kind == "grey":
        Image.fromarray(rng.integers(0, 256, (40, 60), dtype=np.uint8)).save(folder / "a.png")
    elif kind == "rgba":
        Image.fromarray(rng.integers(0, 256, (40, 60, 4), dtype=np.uint8)).save(folder / "a.png")
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / "a.jpg", exif=exif)
    else:
        Image.new("RGB", (5200, 4000), (90, 140, 60)).save(folder / "a.jpg")
    events, results = race(
        tiny_vision.llava_folder(), "vqa", {"source": str(folder), "question": "What is it?"}, max_new_tokens=2
    )
    assert results.status == "finished", results.message
    shown = next(e for e in events if isinstance(e, Picture))
    assert (shown.width, shown.height) == {"turned": (40, 60), "huge": (shown.width, shown.height)}.get(kind, (60, 40))
    assert max(shown.width, shown.height) <= 2048


def test_something_else_than_an_image_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.jpg").write_text("not a picture")
    events, _ = race(tiny_vision.llava_folder(), "vqa", {"source": str(tmp_path / "p"), "question": "What is it?"})
    assert "a.jpg" in failed(events)
    assert not [e for e in events if e.event == "item"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["llava_folder", "llava_next_folder", "smolvlm_folder"])
def test_tokens_merged_in_the_encoder_of_a_model_that_reads(name: str, tmp_path: Path) -> None:
    folder = getattr(tiny_vision, name)()
    options = {"source": str(pictures(tmp_path / "p")), "question": "What is it?"}
    events, results = race(folder, "vqa", options, "tome:keep=0.5", max_new_tokens=2, eos="ignore", batch=2)
    assert [lane.status for lane in results.lanes] == ["finished"] * 2, [lane.message for lane in results.lanes]
    all_tokens, left = (results.lanes[i].value("visual_tokens") for i in (0, 1))
    assert all_tokens
    assert left
    if name == "smolvlm_folder":  # a token is of several patches: all of them still enter
        assert left == all_tokens
    else:
        assert 0.4 * all_tokens < left < 0.7 * all_tokens  # line breaks between tiles stay
    for e in (e for e in events if isinstance(e, ImageTokens) and e.lane == 1):
        assert e.level == []
