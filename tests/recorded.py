"""A small real history: experiments that the engine ran on the tiny model, as spools.

They are run once per process tree and kept beside the tiny models; every caller gets copies. Nothing in
them is made up, so tests must not depend on the numbers but compare with what the spools say.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from tests.tiny import llama_folder, root

ROOT = Path(__file__).parents[1]
SWEEP, AGAIN, TEXT, CHOICE, STOPPED = (f"20260{i}01-100000-{i:06x}" for i in range(1, 6))
SWEPT = (0.25, 0.5, 0.75)
_NEEDLE = {"items": 4, "length": 96}


def _asked() -> dict[str, tuple[str, dict[str, int], tuple[str, ...]]]:
    """Experiment -> workload, its options, own lanes."""
    return {
        SWEEP: ("needle", _NEEDLE, tuple(f"snapkv:keep={k},window=8" for k in SWEPT)),
        AGAIN: ("needle", _NEEDLE, ("kivi:bits=2", "snapkv:keep=1.0")),
        TEXT: ("perplexity", {"items": 3, "context": 48, "score": 24}, ("rtn:bits=4",)),
        CHOICE: ("multiple-choice", {"items": 6}, ("rtn:bits=4",)),
        STOPPED: ("needle", _NEEDLE, ("h2o:keep=0.5",)),
    }


def spools(target: Path) -> Path:
    """Copy the recorded spools into a folder; returns it."""
    source = _recorded()
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.jsonl"):
        shutil.copy(file, target / file.name)
    return target


def _recorded() -> Path:
    parts = [
        Path(__file__),
        *(ROOT / "studio_state" / f"{n}.py" for n in ("events", "experiment", "spool")),
        ROOT / "workers" / "race.py",
    ]
    stamp = hashlib.sha256(b"".join(p.read_bytes() for p in parts)).hexdigest()[:12]
    home = root() / f"history-{stamp}"
    root().mkdir(parents=True, exist_ok=True)
    with FileLock(f"{home}.lock"):
        if not home.exists():
            draft = Path(tempfile.mkdtemp(dir=root()))
            for experiment in _asked():
                _run(draft, experiment)
            draft.rename(home)
    return home


def _run(folder: Path, experiment: str) -> None:
    """Let the engine run one experiment into its spool."""
    from studio_state.events import Cancelled, Output, Submitted
    from studio_state.experiment import ExperimentSpec, WorkloadSpec
    from studio_state.pipeline import parse_pipeline
    from studio_state.spool import SpoolWriter
    from workers.engine import run

    workload, options, lanes = _asked()[experiment]
    spec = ExperimentSpec(
        model=str(llama_folder()),
        workload=WorkloadSpec(id=workload, options=options),
        lanes=tuple(map(parse_pipeline, lanes)),
        max_new_tokens=16,
        threads=1,
    )
    t = 1.767e9 + 86_400 * list(_asked()).index(experiment)
    outputs = 0

    def stop() -> bool:
        return experiment == STOPPED and outputs >= 2

    with SpoolWriter(folder / f"{experiment}.jsonl") as spool:
        spool.append(Submitted(spec=spec, origin="cli", t=t))
        for event in run(spec, is_cancelled=stop):
            spool.append(event.model_copy(update={"experiment": "", "t": t}))
            outputs += isinstance(event, Output)
        if not spool.ended:
            spool.append(Cancelled(t=t))
