"""Training a recipe in this process: the folder it fills, what is told meanwhile, and how it is stopped.

The request is one JSON object: ``{"recipe": ID, "out": FOLDER, "knobs": {...}, "seed": 0, "threads": null}``. It stops between
steps with the state kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from studio_state.errors import SpecError
from workers.environment import use_threads
from workers.job import Job, Progress
from workers.recipe import FACTS, make_recipe
from workers.training.loop import UNFINISHED, TrainingRun

BEGUN, LOCK = "recipe.json", "lock"


class Begun(BaseModel):
    """What a folder is trained with; kept beside the unfinished state, so that nothing else goes on from it."""

    model_config = ConfigDict(frozen=True)
    recipe: str
    knobs: dict[str, Any]
    seed: int


class Request(BaseModel):
    """What to train, where to, on how many CPU threads (None = all cores), scored on about so many examples (None = all)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    recipe: str
    out: Path
    knobs: dict[str, Any] = Field(default_factory=dict)
    seed: int = Field(0, ge=0)
    threads: int | None = Field(None, ge=1)
    examples: int | None = Field(None, ge=1)


def _train(request: Request, progress: Progress) -> float:
    recipe = make_recipe(request.recipe, request.knobs)
    begun = Begun(recipe=request.recipe, knobs=recipe.model_dump(mode="json"), seed=request.seed)
    stands = standing(request.out, begun)
    if stands == "finished":
        progress.note(f"{request.out} holds this already: {request.recipe} of the same knobs and seed; nothing was done")
        return 0.0
    use_threads(request.threads)
    run = TrainingRun(request.out, request.seed, progress.say, progress.is_stopped, request.examples)
    with taken(request.out, begun):
        if stands == "unfinished":
            progress.note(f"going on with what is unfinished in {request.out}")
        trained = recipe.train(run)
    return sum(trained.seconds.values())


JOB = Job(Request, "train", "the training", "run", _train, lambda request: f"the state is kept in {request.out / UNFINISHED}")


@contextmanager
def taken(out: Path, begun: Begun) -> Iterator[None]:
    """Have the folder for oneself; its unfinished state is removed where the training inside comes to its end.

    Raises:
        SpecError: another process trains into the folder.
    """
    unfinished = out / UNFINISHED
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(unfinished / LOCK).acquire(timeout=0)
    except Timeout as e:
        raise SpecError(f"another process trains into {out}; wait for it, or choose another folder") from e
    with held:
        part = unfinished / f"{BEGUN}.part"
        part.write_text(begun.model_dump_json(indent=1) + "\n")
        part.replace(unfinished / BEGUN)
        yield
        shutil.rmtree(unfinished)


def standing(out: Path, wanted: Begun) -> Literal["new", "unfinished", "finished"]:
    """How far the folder is with what is wanted.

    Raises:
        SpecError: it holds something else.
    """
    if out.exists() and not out.is_dir():
        raise SpecError(f"{out} is a file; give a new or empty folder")
    state = out / UNFINISHED
    if any(state.glob("*.pt")) and (before := begun_in(state / BEGUN)):
        if differs := difference(before, wanted):
            raise SpecError(f"{out} holds an unfinished training with {differs}; give the same again, or another folder")
        return "unfinished"
    if before := begun_in(out / FACTS):
        if differs := difference(before, wanted):
            raise SpecError(f"{out} holds a checkpoint that was trained with {differs}; give another folder")
        return "finished"
    before_any_step = {p for p in state.glob("*") if p.name in (BEGUN, LOCK) or p.suffix == ".part"}
    if any(p.is_file() and p not in before_any_step for p in out.rglob("*")):
        raise SpecError(f"{out} holds something else than a checkpoint of {wanted.recipe}; give a new or empty folder")
    return "new"


def begun_in(path: Path) -> Begun | None:
    """What a folder was trained with, from one of its two records; None where there is none that can be read."""
    try:
        return Begun.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def difference(before: Begun, wanted: Begun) -> str:
    """In what a training differs from the one that is wanted, in words; empty if in nothing."""
    if before.recipe != wanted.recipe:
        return f"recipe {before.recipe}, not {wanted.recipe}"
    names = dict.fromkeys((*wanted.knobs, *before.knobs))
    changed = [(n, before.knobs.get(n), wanted.knobs.get(n)) for n in names if before.knobs.get(n) != wanted.knobs.get(n)]
    return " and ".join(f"{n} {a}, not {b}" for n, a, b in [("seed", before.seed, wanted.seed), *changed] if a != b)
