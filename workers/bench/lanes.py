"""Races through the real engine: lanes interleaved in one process, ratios as the studio shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from studio_state.errors import StudioError
from studio_state.events import Event, Failed, LaneFinished, Metric, Ratio
from studio_state.experiment import ExperimentSpec, WorkloadSpec
from studio_state.pipeline import Pipeline, parse_pipeline
from studio_state.stats import Interval
from workers.analyzers.runtime_dissection import RuntimeDissection
from workers.bench.plan import Plan
from workers.bench.report import json_line, ratio_line
from workers.engine import run
from workers.environment import pick_device, use_threads
from workers.host import ModelHost
from workers.lanes import Lane
from workers.mechanisms.phases import ShortRun
from workers.workloads.base import ItemContext
from workers.workloads.registry import make_workload

SPEED = "decode_tokens_per_s"


@dataclass(frozen=True)
class LaneResult:
    """One lane of a race.

    Attributes:
        speeds: decoded tokens per second, one a repetition.
        ratio: to the baseline (lane 0), from interleaved pairs; None for the baseline.
        same_output: share of repetitions whose text equals the baseline's.
    """

    pipeline: str
    speeds: list[float]
    ratio: Interval | None
    same_output: float | None


def race(plan: Plan, lanes: Sequence[str], dtype: str = "float32", host: ModelHost | None = None) -> list[LaneResult]:
    """Run pipelines against the baseline, ``plan.pairs`` times each in rotating order.

    Args:
        lanes: one-line pipelines; the baseline comes first by itself unless it is named.
        host: keeps the model loaded between races.

    Raises:
        StudioError: the experiment or one of its lanes failed; the message is the engine's.
    """
    options = {"items": 1, "prompt_tokens": plan.prompt_tokens, "new_tokens": plan.new_tokens}
    pipelines = [Pipeline(), *map(parse_pipeline, lanes)]
    spec = ExperimentSpec(
        model=plan.model,
        workload=WorkloadSpec(id="speed", options=options),
        lanes=tuple(pipelines),
        dtype=dtype,  # type: ignore[arg-type]
        threads=plan.threads,
        repeats=plan.pairs,
    )
    told = measure(spec, (SPEED, "same_output"), host)
    return [
        LaneResult(p.text(), lane.items[SPEED], lane.ratios.get(SPEED), lane.means.get("same_output"))
        for p, lane in zip(pipelines, told, strict=True)
    ]


@dataclass
class LaneMetrics:
    """What a lane of an experiment measured, by metric.

    Attributes:
        items: values of the single items.
        means: the lane's value.
        ratios: to the baseline.
    """

    items: dict[str, list[float]]
    means: dict[str, float]
    ratios: dict[str, Interval]


def measure(spec: ExperimentSpec, names: Sequence[str], host: ModelHost | None = None) -> list[LaneMetrics]:
    """Run an experiment through the engine and collect some metrics of every lane.

    Raises:
        StudioError: the experiment or one of its lanes failed; the message is the engine's.
    """
    lanes = [LaneMetrics({name: [] for name in names}, {}, {}) for _ in spec.lanes]
    for event in _finished(spec, host):
        if isinstance(event, Metric) and event.name in names and event.value is not None:
            lane = lanes[event.lane]
            if event.item is None:
                lane.means[event.name] = event.value
            else:
                lane.items[event.name].append(event.value)
        if isinstance(event, Ratio) and event.name in names:
            lanes[event.lane].ratios[event.name] = Interval(event.value, event.low, event.high, event.n)
    return lanes


def dissect(spec: ExperimentSpec, host: ModelHost) -> list[dict[str, Any]]:
    """Where a decode step of every lane spends its time (:class:`RuntimeDissection`, one pass of each kind), without a race."""
    info, device = host.inspect(spec), pick_device(spec.device)
    use_threads(spec.threads)
    session, _ = host.open(spec, info, device)
    items = make_workload(spec.workload).make_items(ItemContext(session.processor, spec.seed, info.context))
    found = []
    for lane in (Lane(i, p, session) for i, p in enumerate(spec.lanes)):
        with session.closing():
            found.append(RuntimeDissection(repeats=1).step(ShortRun(session, lane.attached_for, items), "decode"))
    return found


def _finished(spec: ExperimentSpec, host: ModelHost | None) -> Iterator[Event]:
    """The events of an experiment; a failure is raised."""
    for event in run(spec, host):
        if isinstance(event, Failed):
            raise StudioError(event.message)
        if isinstance(event, LaneFinished) and event.status != "finished":
            raise StudioError(f"{spec.lanes[event.lane].text()}: {event.message}")
        yield event


def against_baseline(bench: str, plan: Plan, pipeline: str, dtype: str = "float32") -> None:
    """Race one pipeline against the baseline and print the result."""
    base, lane = race(plan, [pipeline], dtype)
    tell(bench, plan, base, lane, dtype)


def tell(bench: str, plan: Plan, base: LaneResult, lane: LaneResult, dtype: str) -> None:
    """Print medians, the ratio and the JSON line of one comparison."""
    medians = {"baseline": median(base.speeds), "lane": median(lane.speeds)}
    if lane.ratio is None:
        raise StudioError(f"the engine gave no ratio for {lane.pipeline}")
    print(f"baseline {dtype}: {medians['baseline']:.1f} tokens/s (median of {len(base.speeds)})")
    print(
        f"{lane.pipeline}: {medians['lane']:.1f} tokens/s (median of {len(lane.speeds)}); same text as the baseline: {lane.same_output == 1}"
    )
    print(ratio_line(f"{lane.pipeline} / baseline", lane.ratio))
    r = lane.ratio
    print(
        json_line(bench, plan, pipeline=lane.pipeline, dtype=dtype, medians=medians, ratio=r.value, low=r.low, high=r.high, n=r.n)
    )
