"""First-block cache against the library's hook of the same idea: same seeds, steps and thresholds, lanes in turn.

Both are told as speed against the uncached run, with the PSNR of their pictures to the uncached ones. The library's
``enable_cache`` belongs to some denoisers only; the function that it calls takes them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

from torch import nn

from studio_state.errors import ModelError, SpecError, StudioError
from studio_state.experiment import ExperimentSpec, WorkloadSpec
from studio_state.pipeline import Pipeline, parse_pipeline
from studio_state.problems import problems
from studio_state.stats import ratio_interval
from workers.bench.plan import DRAWING_MODEL, Plan
from workers.bench.report import json_line, ratio_line
from workers.environment import pick_device, use_threads
from workers.families.base import RunTrace
from workers.families.diffusion import distances
from workers.host import ModelHost
from workers.meters.speed import speed
from workers.methods import catalogue, effective
from workers.session import Session
from workers.workloads.base import ItemContext
from workers.workloads.registry import make_workload

THRESHOLDS = (0.05, 0.1, 0.2)  # the library's default, ours, and twice that
UNCACHED, OURS, LIBRARYS = "uncached", "first-block-cache", "the library's hook"


@dataclass
class Lane:
    """One of the three: what is attached while it draws, and what came of it.

    Attributes:
        seconds: of one picture, once a pair.
        hits: steps that reused.
        trace: of the last run.
    """

    attached: Callable[[], AbstractContextManager[Any]]
    seconds: list[float] = field(default_factory=list)
    hits: int = 0
    trace: RunTrace | None = None


def bench(plan: Plan) -> None:
    """Print hits, PSNR and ratios at each threshold.

    Raises:
        StudioError: the model is not there, is no pipeline with a transformer, or the library's hook does not run on it.
    """
    host, spec = ModelHost(), _spec(plan)
    use_threads(plan.threads)
    try:
        info = host.inspect(spec)
    except ModelError as e:
        if plan.drawing_model != DRAWING_MODEL:
            raise
        print(f"left out: {e}; name a pipeline with --drawing-model")
        return
    if found := problems(spec, catalogue(), info):
        raise SpecError(found)
    session = host.open(spec, info, pick_device(spec.device))[0]
    items = make_workload(spec.workload).make_items(ItemContext(session.processor, 0, info.context, _labels(session)))
    for threshold in THRESHOLDS:
        (policy,) = effective(parse_pipeline(f"first-block-cache:threshold={threshold}"))
        lanes = {
            UNCACHED: Lane(nullcontext),
            OURS: Lane(lambda policy=policy: policy.attach(session)),  # type: ignore[misc]
            LIBRARYS: Lane(lambda threshold=threshold: librarys_cache(session, threshold)),  # type: ignore[misc]
        }
        for pair in range(-1, plan.pairs):  # the first warms up
            order = list(lanes)
            for who in [*order[pair % 3 :], *order[: pair % 3]]:
                _draw(session, items, lanes[who], timed=pair >= 0)
        _tell(plan, threshold, lanes)


def _spec(plan: Plan) -> ExperimentSpec:
    return ExperimentSpec(
        model=plan.drawing_model,
        workload=WorkloadSpec(id="generate-images", options={"items": plan.drawn, "steps": plan.denoising_steps}),
        lanes=(Pipeline(), parse_pipeline("first-block-cache")),
        dtype="float32",
        threads=plan.threads,
    )


def _labels(session: Session) -> tuple[str, ...]:
    model: Any = session.model
    labels: tuple[str, ...] = model.labels
    return labels


def _draw(session: Session, items: Any, lane: Lane, timed: bool) -> None:
    """One batch. Steps that reused are those at which the second block did not compute."""
    second = session.model.get_submodule(session.family.parts(session.model)["layers"][1])
    inside = next(m for m in second.modules() if isinstance(m, nn.Linear))
    ran: set[int] = set()

    def computed(*_: Any) -> None:
        if session.denoising is not None:
            ran.add(session.denoising.step)

    with lane.attached():
        handle = inside.register_forward_hook(computed)
        try:
            lane.trace = session.family.begin(session, items)
            for _ in session.family.run(session, lane.trace):
                pass
        finally:
            handle.remove()
    lane.hits = int(lane.trace.counts["denoising_steps"]) - len(ran)
    if timed:
        lane.seconds.append(speed(lane.trace)["seconds_per_image"])


@contextmanager
def librarys_cache(session: Session, threshold: float) -> Iterator[None]:
    """The library's first-block cache on the denoiser, taken off again.

    Raises:
        StudioError: it does not know these blocks, or fails on what they give.
    """
    from diffusers.hooks.first_block_cache import (
        _FBC_BLOCK_HOOK,
        _FBC_LEADER_BLOCK_HOOK,
        FirstBlockCacheConfig,
        apply_first_block_cache,
    )
    from diffusers.hooks.hooks import HookRegistry
    from diffusers.models.cache_utils import CacheMixin

    net: Any = session.family.backbone(session.model)
    try:
        apply_first_block_cache(net, FirstBlockCacheConfig(threshold=threshold))
        with CacheMixin.cache_context(net, "all"):  # pipelines that know nothing of caches set none
            yield
    except (TypeError, ValueError) as e:
        raise StudioError(f"the library's first-block cache does not run on {type(net).__name__}: {e}") from e
    finally:
        registry = HookRegistry.check_if_exists_or_initialize(net)
        for name in (_FBC_LEADER_BLOCK_HOOK, _FBC_BLOCK_HOOK):
            registry.remove_hook(name, recurse=True)


def _tell(plan: Plan, threshold: float, lanes: dict[str, Lane]) -> None:
    """Print one threshold."""
    told: dict[str, Any] = {}
    pictures = {who: lane.trace.drawn if lane.trace else [] for who, lane in lanes.items()}
    apart = max(float((a - b).abs().max()) for a, b in zip(pictures[OURS], pictures[LIBRARYS], strict=True))
    print(f"threshold {threshold}: uncached {1000 * median(lanes[UNCACHED].seconds):.1f} ms a picture (median)")
    for who in (OURS, LIBRARYS):
        found = [distances(a, b).get("psnr") for a, b in zip(pictures[UNCACHED], pictures[who], strict=True)]
        differing = [x for x in found if x is not None]
        psnr = mean(differing) if differing else None
        ratio = ratio_interval(lanes[UNCACHED].seconds, lanes[who].seconds)
        near = "equal pictures" if psnr is None else f"{psnr:.1f} dB"
        hits = lanes[who].hits
        print(f"  {who}: {hits} of {plan.denoising_steps} steps reused, {near}; {ratio_line('speed of it / uncached', ratio)}")
        told[who] = {"hits": hits, "psnr": psnr, "ratio": ratio.value, "low": ratio.low, "high": ratio.high, "n": ratio.n}
    between = ratio_interval(lanes[LIBRARYS].seconds, lanes[OURS].seconds)
    print(f"  {ratio_line('speed of ours / the library', between)}; largest difference of their pictures: {apart:.1e}")
    print(json_line("first-block-cache", plan, model=plan.drawing_model, threshold=threshold, apart=apart, **told))
