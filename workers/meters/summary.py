"""From samples of items to one number a lane, and to ratios with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp, isfinite
from statistics import fmean

from studio_state.events import Event, Metric, Ratio
from studio_state.metrics import METRICS
from studio_state.results import summarize as one_number
from studio_state.stats import mcnemar, paired_bootstrap, ratio_interval, wilson
from workers.lanes import Lane, live
from workers.workloads.base import Workload

LIVE = ("ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s", "score_tokens_per_s")  # ratios told while the race runs


def summarize(lanes: Sequence[Lane], workload: Workload, reference: int) -> Iterator[Event]:
    """One metric event per lane and name without an item, then the ratios to the reference lane."""
    running = live(lanes)
    for lane in running:
        for name, samples in lane.samples.items():
            value = one_number(name, samples.values())
            if value is not None and METRICS[name].summary != "last" and name != "accuracy":
                yield lane.whole(name, value, n=len(samples))
        judged = [g.correct for g in lane.grades if g.correct is not None]
        if judged:
            share = wilson(sum(judged), len(judged))
            yield lane.whole("accuracy", share.value, n=len(judged)).model_copy(update={"low": share.low, "high": share.high})
        for name, value in workload.summarize(lane.results).items():
            yield lane.whole(name, value, n=len(lane.results))
    base = lanes[reference]
    if base not in running:
        return
    for lane in running:
        if lane is not base:
            yield from _ratios(lane, base)


def so_far(lanes: Sequence[Lane], reference: int) -> Iterator[Event]:
    """The main speed ratios from the pairs measured until now, for those who watch."""
    base = lanes[reference]
    for lane in live(lanes):
        if lane is base or not (lane.interleaved and base.interleaved):
            continue
        for name in LIVE:
            pairs = _pairs(lane, base, name)
            if pairs and all(a > 0 < b for a, b in pairs):
                r = ratio_interval([a for a, _ in pairs], [b for _, b in pairs])
                yield Ratio(lane=lane.index, name=name, value=r.value, low=r.low, high=r.high, n=len(pairs))


def _pairs(lane: Lane, base: Lane, name: str) -> list[tuple[float, float]]:
    """Values of the same item and repeat: (lane, base)."""
    mine, theirs = lane.samples.get(name, {}), base.samples.get(name, {})
    return [(mine[k], theirs[k]) for k in theirs if k in mine]


def _ratios(lane: Lane, base: Lane) -> Iterator[Event]:
    interleaved = lane.interleaved and base.interleaved
    for name, info in METRICS.items():
        if not info.ratio or name not in lane.given or not base.given.get(name):
            continue
        pairs = _pairs(lane, base, name)
        value = lane.given[name] / base.given[name]
        if not isfinite(value):
            continue
        if name == "perplexity":
            yield _perplexity_ratio(lane, base, value)
        elif info.group == "speed" and len(pairs) > 1 and interleaved and all(b > 0 for _, b in pairs):
            r = ratio_interval([a for a, _ in pairs], [b for _, b in pairs])
            yield Ratio(lane=lane.index, name=name, value=r.value, low=r.low, high=r.high, n=len(pairs))
        else:
            yield Ratio(lane=lane.index, name=name, value=value, n=max(1, len(pairs)))
    paired = [
        (a.correct, b.correct)
        for a, b in zip(lane.grades, base.grades, strict=False)
        if a.correct is not None and b.correct is not None
    ]
    if paired:
        test = mcnemar([a for a, _ in paired], [b for _, b in paired])
        yield Metric(lane=lane.index, name="p_value", value=test.p_value, n=len(paired))


def _perplexity_ratio(lane: Lane, base: Lane, value: float) -> Ratio:
    """Interval by resampling items: the ratio is exp of a difference of mean NLLs."""
    mine, theirs = ([fmean(x for row in r.nll for x in row) for r in one.results] for one in (lane, base))
    interval = paired_bootstrap(mine, theirs)
    low, high = (None if x is None else exp(x) for x in (interval.low, interval.high))
    return Ratio(lane=lane.index, name="perplexity", value=value, low=low, high=high, n=interval.n)
