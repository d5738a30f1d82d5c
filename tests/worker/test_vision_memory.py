"""Nothing piles up in a worker that runs race after race on a model that sees."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from studio_state.events import Finished, LaneFinished
from studio_state.experiment import ExperimentSpec
from studio_state.pipeline import parse_pipeline
from tests import tiny_vision
from workers import environment
from workers.engine import run
from workers.host import ModelHost
from workers.meters.memory import resident_bytes

RUNS, COUNTED = 20, 15
LANES = ("tome:keep=0.5+layer-skip+lean-decode", "visionzip+snapkv:keep=0.5+kivi:bits=8,group_size=8,residual=8")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with one small picture."""
    rng = np.random.default_rng(3)
    small = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(np.kron(small, np.ones((9, 9, 1), dtype=np.uint8))).save(tmp_path / "one.png")
    return tmp_path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the look at the machine's load, which waits; what is there already need not be gone through again and again."""
    monkeypatch.setattr(environment, "other_load", lambda device: "")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
def test_twenty_races_with_one_host_need_no_more_memory_than_five(pictures: Path, quick: None) -> None:
    torch.set_num_threads(1)
    host = ModelHost()
    spec = ExperimentSpec(
        model=str(tiny_vision.llava_folder()),
        workload={"id": "vqa", "options": {"source": str(pictures), "question": "What is it?"}},  # type: ignore[arg-type]
        lanes=tuple(parse_pipeline(x) for x in LANES),
        threads=1,
        max_new_tokens=4,
        eos="ignore",
    )
    resident = []
    for _ in range(RUNS):
        events = list(run(spec, host))
        assert isinstance(events[-1], Finished), events[-1]
        assert {e.status for e in events if isinstance(e, LaneFinished)} == {"finished"}
        del events
        gc.collect()
        resident.append(resident_bytes() / 2**20)
    slope = np.polyfit(range(COUNTED), resident[-COUNTED:], 1)[0]
    assert slope < 1.0, f"{slope:.2f} MB a race: {[round(x) for x in resident]}"
