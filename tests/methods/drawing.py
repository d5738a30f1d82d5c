"""Drawing with tiny diffusion pipelines through the family, as the engine does; and what a policy must put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch

from studio_state.experiment import ExperimentSpec
from tests.methods.driving import attached
from tests.tiny_diffusion import build_pipeline, stirred
from workers.families.base import RunTrace
from workers.families.class_pipeline import ClassConditionalPipeline
from workers.host import ModelHost
from workers.methods import Policy
from workers.session import Session
from workers.workloads.base import Item

OWN = "own-unet"  # the studio's pipeline over a UNet that works on pixels
LABEL = 1


def own_unet() -> Any:
    """Attention [B, C, H, W] at 8 x 8 and 4 x 4; three classes, and the fourth row for none."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=4,
    )
    return ClassConditionalPipeline(
        unet=stirred(net), scheduler=diffusers.DDIMScheduler(), id2label={0: "boat", 1: "house", 2: "tree"}
    )


def pipeline_folder(kind: str, folder: Path) -> Path:
    """A tiny pipeline of one of ``tests.tiny_diffusion``'s kinds, or the studio's own."""
    if kind != OWN:
        return build_pipeline(kind, folder)
    if not (folder / OWN / "model_index.json").is_file():
        own_unet().save_pretrained(folder / OWN)
    return folder / OWN


@cache
def opened(folder: Path) -> Session:
    host = ModelHost()
    spec = ExperimentSpec.model_validate({"model": str(folder), "workload": {"id": "generate-images"}, "lanes": []})
    session, _ = host.open(spec, host.inspect(spec), torch.device("cpu"))
    session.model.pipeline.set_progress_bar_config(disable=True)  # type: ignore[union-attr, operator]
    return session


def drawing_session(kind: str, folder: Path, **options: Any) -> Session:
    """A session on a tiny pipeline, loaded once, whose workload has these options."""
    session = opened(pipeline_folder(kind, folder))
    spec = session.spec.model_copy(
        update={"workload": session.spec.workload.model_copy(update={"options": {"steps": 8, **options}})}
    )
    return Session(
        spec=spec,
        info=session.info,
        family=session.family,
        model=session.model,
        processor=session.processor,
        device=session.device,
        dtype=session.dtype,
    )


def draw(session: Session, *policies: Policy, seeds: Sequence[int] = (5, 6), guidance: float = 3.0) -> RunTrace:
    """One batch of pictures, one a seed, in as many steps as the session's workload asks for."""
    size = 16 if type(session.model.pipeline).__name__ == "FluxPipeline" else 0  # its own is 256 whatever its parts are
    data = {"steps": session.spec.workload.options["steps"], "guidance": guidance, "size": size, "label": LABEL}
    items = [Item(id=f"p{s}", task="draw", chat=False, prompt="a red boat", data={**data, "seed": s}) for s in seeds]
    with attached(session, *policies):
        trace = session.family.begin(session, items)
        for _ in session.family.run(session, trace):
            pass
    return trace


def same_pictures(a: RunTrace, b: RunTrace) -> bool:
    """Whether all pictures are equal bit for bit."""
    return len(a.drawn) == len(b.drawn) and all(torch.equal(x, y) for x, y in zip(a.drawn, b.drawn, strict=True))


@contextmanager
def sizes_seen(module: Any, axis: int = 0) -> Iterator[list[int]]:
    """The size of one axis of what a module gets, call by call."""
    seen: list[int] = []
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[axis]))
    try:
        yield seen
    finally:
        handle.remove()


def condition(session: Session) -> dict[str, Any]:
    """Everything of a session and its model that a policy may touch and must put back."""
    kept = {f.name: getattr(session, f.name) for f in fields(session) if f.name not in ("built", "acted", "counts")}
    modules = dict(session.model.named_modules())
    return {
        **{k: list(v) if isinstance(v, list) else v for k, v in kept.items()},
        "modules": {n: id(m) for n, m in modules.items()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules.items()},
        "own": {n: sorted(vars(m)) for n, m in modules.items()},
        "processors": {n: id(m.processor) for n, m in modules.items() if hasattr(m, "processor")},
        "weights": {n: (p.data_ptr(), p._version) for n, p in session.model.named_parameters()},
        "scheduler": sorted(set(vars(session.model.pipeline.scheduler)) & {"step", "set_timesteps"}),  # type: ignore[arg-type, union-attr]
    }


def broken_off(session: Session, policy: Policy) -> None:
    """Leave in the middle of a run."""
    data = {"steps": 8, "guidance": 3.0, "size": 0, "label": LABEL, "seed": 5}
    with attached(session, policy):
        trace = session.family.begin(session, [Item(id="p", task="draw", chat=False, prompt="a boat", data=data)])
        for _, step in zip(range(4), session.family.run(session, trace), strict=False):
            assert step
        raise KeyboardInterrupt
