"""Exporting a packed model in this process: the base with a lane's weight policies, written as a folder that ``--model`` takes.

The request is one JSON object: ``{"model": NAME, "pipeline": {...}, "out": FOLDER, ...}`` (:class:`Request`). The folder appears
only when all of it is written.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from studio_state import __version__
from studio_state.errors import ModelError, SpecError, StudioError
from studio_state.experiment import ExperimentSpec, ModelInfo, WorkloadSpec
from studio_state.pipeline import Pipeline
from studio_state.problems import problems
from workers import plan
from workers.environment import environment, pick_device, use_threads
from workers.host import ModelHost
from workers.job import Job, Progress
from workers.lanes import Lane
from workers.mechanisms.linear import held_bytes
from workers.methods import Policy, catalogue, effective
from workers.models.info import file_dtype
from workers.models.packed_recipe import PackedRecipe
from workers.models.packed_save import save_packed
from workers.session import Session

CALIBRATED_ON = {"llm": "prompts", "vlm": "vqa", "vit": "classify", "diffusion": "generate-images"}
"""Workload whose inputs policies calibrate on where none is given; language models read a text of the studio's whatever it is."""

Say = Callable[[str, float | None], None]


class Request(BaseModel):
    """What to export, where to.

    Attributes:
        dtype: of what no policy replaces; ``auto`` = as the model's files store it, or the one that a policy works in.
        workload: see :data:`CALIBRATED_ON`; None = the family's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str
    pipeline: Pipeline
    out: Path
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    workload: WorkloadSpec | None = None
    threads: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    trust_remote_code: bool = False


def export(
    request: Request, say: Say = lambda text, done: None, is_cancelled: Callable[[], bool] = lambda: False
) -> PackedRecipe:
    """Write the folder.

    Raises:
        SpecError: a folder that is not empty, policies that replace no weights, or that do not fit the model.
        ModelError: a model that cannot be loaded, or whose packed form cannot be stored.
        StudioError: it does not fit into memory, packed or not.
        Cancelled: the person asked to stop.
    """
    out = request.out.expanduser().absolute()
    _check_folder(out)
    policies = effective(request.pipeline)
    _check_policies(policies)
    host, device = ModelHost(), pick_device(request.device)
    use_threads(request.threads)
    spec = ExperimentSpec(
        model=request.model,
        workload=request.workload or WorkloadSpec(id="prompts"),
        lanes=(Pipeline(), request.pipeline),
        device=request.device,
        seed=request.seed,
        threads=request.threads,
        trust_remote_code=request.trust_remote_code,
    )
    info = host.inspect(spec, say)
    spec = spec.model_copy(
        update={
            "dtype": _dtype(request, host, policies),
            "workload": request.workload or WorkloadSpec(id=CALIBRATED_ON[info.family]),
        }
    )
    if found := problems(spec, catalogue(), info, host.unavailable()):
        raise SpecError([p.model_copy(update={"lane": None}) for p in found])
    say(f"loading {info.name}", None)
    session = _open(host, spec, info, device, policies, say)
    session.is_cancelled, session.say = is_cancelled, say
    bare, base_bytes = {id(m) for m in session.model.modules()}, _base_bytes(session, info)
    lane = Lane(1, request.pipeline, session)
    with session.closing(), lane.attached(prepare=True):
        lane.check_effect()
        if lane.flags:
            raise SpecError("; ".join(lane.flags) + "; remove what does nothing, or set its knobs")
        if not any(lane.acted.values()):
            raise SpecError(f"{lane.order} replaces no weight of {info.name}, so there is nothing to pack; set its knobs")
        session.check_cancelled()
        say(f"writing {out}", None)
        return _write(out, host, session, lane, bare, base_bytes)


def _check_folder(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SpecError(f"{out} is there already; give a new or empty folder")


def _check_policies(policies: list[Policy]) -> None:
    if not policies:
        raise SpecError("the pipeline is empty, so there is nothing to pack; give weight policies, for example rtn:bits=4")
    others = [p.card.id for p in policies if not p.card.changes_weights]
    if others:
        raise SpecError(
            f"{', '.join(others)} change{'s' if len(others) == 1 else ''} how a model runs, not its weights, so an exported model cannot "
            "hold that; leave it out here, and add it as a lane where the exported model runs"
        )


def _dtype(request: Request, host: ModelHost, policies: list[Policy]) -> str:
    """The number format of what no policy replaces."""
    if request.dtype != "auto":
        return request.dtype
    stored = file_dtype(host.found())
    needed = next((p.card.dtypes for p in policies if p.card.dtypes and stored not in p.card.dtypes), None)
    return needed[0] if needed else stored


def _open(
    host: ModelHost, spec: ExperimentSpec, info: ModelInfo, device: torch.device, policies: list[Policy], say: Say
) -> Session:
    """The base in memory; replaced while it loads where it does not fit otherwise.

    Raises:
        StudioError: it does not fit at all.
    """
    needs = plan.needs(spec, info, device, {})
    if needs.baseline.fits:
        return host.open(spec, info, device)[0]
    if not needs.lane(policies).fits:
        raise StudioError(plan.too_large(info, needs.baseline))
    if why := plan.needs_whole_model(info, policies):
        raise StudioError(why)
    return host.open_compressed(spec, info, device, policies, say)[0]


def _base_bytes(session: Session, info: ModelInfo) -> int:
    """What the bare model holds; where it was never in memory, what its weights would."""
    whole = not any(getattr(m, "made_by", ()) for m in session.model.modules())
    return held_bytes([session.model]) if whole else info.parameters * session.dtype.itemsize


def _write(out: Path, host: ModelHost, session: Session, lane: Lane, bare: set[int], base_bytes: int) -> PackedRecipe:
    """All of it into a folder beside, which then becomes the one that was asked for."""
    cards = [p.card for p in lane.policies]
    place = environment(session.device)
    facts: dict[str, Any] = {
        "info": _for_others(session.info),
        "pipeline": lane.order,
        "dtype": str(session.dtype).removeprefix("torch."),
        "dtypes": _common(c.dtypes for c in cards),
        "devices": _common(c.devices for c in cards),
        "versions": {"pareto-studio": __version__, **place["versions"]},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        recipe = save_packed(draft, host.found(), session.model, session.processor, bare, base_bytes, facts)
        draft.chmod(0o755)
        if out.exists():
            out.rmdir()
        draft.rename(out)
    except OSError as e:
        raise ModelError(f"{out} cannot be written ({e}); give a folder on a disk with room") from e
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return recipe


def _for_others(info: ModelInfo) -> ModelInfo:
    """What is known of the base, without where its folder lies on this machine."""
    is_folder = info.source.startswith("folder ")
    return info.model_copy(update={"name": Path(info.name).name, "source": ""}) if is_folder else info


def _common(allowed: Any) -> tuple[str, ...]:
    """What all of some lists allow, where an empty list allows everything."""
    lists = [a for a in allowed if a]
    return tuple(x for x in lists[0] if all(x in other for other in lists)) if lists else ()


def _export(request: Request, progress: Progress) -> None:
    recipe = export(request, progress.say, progress.is_stopped)
    if recipe.complaint:
        progress.note(recipe.complaint, warning=True)


JOB = Job(Request, "export", "the export", "build", _export, lambda request: "nothing was written")
