"""The number that a claim's check compares with its limits, and its 95 % interval, from the samples of lanes. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

from studio_state.claims import Check
from studio_state.metrics import METRICS
from studio_state.results import LaneResults, Results
from studio_state.stats import Interval, paired_bootstrap, paired_shares, ratio_interval, wilson

_ONE_PAIR = "one measurement has no interval"


class Estimate(NamedTuple):
    """A number with its interval, or the reason why there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    why_not: str = ""


def estimated(check: Check, results: Mapping[str, Results]) -> Estimate:
    """The number that a check compares with its limits."""
    lanes = [results[check.experiment].lanes[i] for i in check.lanes()]
    match check.kind:
        case "ratio":
            return ratio_between(check.metric, lanes[0], lanes[1])
        case "difference":
            return difference_between(check.metric, lanes[0], lanes[1])
        case "growth":
            than = [results[check.than].lanes[i] for i in check.lanes()]
            return _over(ratio_between(check.metric, *lanes), ratio_between(check.metric, *than))
        case "ordering":
            steps = [difference_between(check.metric, b, a) for a, b in pairwise(lanes)]
            return min(steps, key=lambda s: (s.why_not == "", -math.inf if s.low is None else s.low))
        case "value":
            return _alone(check.metric, lanes[0])


def is_exact(metric: str) -> bool:
    """True for counts and bytes: the same every time, so no interval is needed."""
    return METRICS[metric].group in ("memory", "count") and METRICS[metric].summary != "last"


def _exact(value: float | None) -> Estimate:
    return Estimate(None, why_not="the metric was not taken") if value is None else Estimate(value, value, value, 1)


def ratio_between(metric: str, lane: LaneResults, against: LaneResults) -> Estimate:
    """The ratio of a metric, lane over another lane, from the items that both have."""
    if is_exact(metric):
        mine, theirs = lane.value(metric), against.value(metric)
        return _exact(mine / theirs if mine is not None and theirs else None)
    if metric == "perplexity":  # exp of a difference of mean negative log-likelihoods
        e = difference_between("nll", lane, against)
        return Estimate(_exp(e.value), _exp(e.low), _exp(e.high), e.n, e.why_not)
    x, y = _pairs(metric, lane, against)
    if not x:
        return Estimate(None, why_not="the metric was not taken in both lanes")
    if min(*x, *y) <= 0:
        return Estimate(None, n=len(x), why_not="a ratio needs values above 0")
    if METRICS[metric].group == "speed" and not (lane.interleaved and against.interleaved):
        return Estimate(
            ratio_interval(x, y).value, n=len(x), why_not="the lanes did not run in turn, so their times have no common interval"
        )
    return _with_interval(ratio_interval(x, y))


def difference_between(metric: str, lane: LaneResults, against: LaneResults) -> Estimate:
    """The difference of a metric, lane less another lane, from the items that both have."""
    if metric == "accuracy":
        graded = [(lane.outputs[k].correct, o.correct) for k, o in against.outputs.items() if k in lane.outputs]
        judged = [(a, b) for a, b in graded if a is not None and b is not None]
        if not judged:
            return Estimate(None, why_not="nothing was graded")
        return _with_interval(paired_shares([a for a, _ in judged], [b for _, b in judged]))
    if is_exact(metric):
        mine, theirs = lane.value(metric), against.value(metric)
        return _exact(None if mine is None or theirs is None else mine - theirs)
    x, y = _pairs(metric, lane, against)
    return _with_interval(paired_bootstrap(x, y)) if x else Estimate(None, why_not="the metric was not taken in both lanes")


def _alone(metric: str, lane: LaneResults) -> Estimate:
    if metric == "accuracy":
        judged = [o.correct for o in lane.outputs.values() if o.correct is not None]
        return _with_interval(wilson(sum(judged), len(judged))) if judged else Estimate(None, why_not="nothing was graded")
    if is_exact(metric):
        return _exact(lane.value(metric))
    samples = list(lane.samples.get(metric, {}).values())
    return (
        _with_interval(paired_bootstrap(samples, [0.0] * len(samples)))
        if samples
        else Estimate(None, why_not="the metric was not taken")
    )


def _exp(value: float | None) -> float | None:
    return None if value is None else math.exp(min(value, 700.0))


def _over(here: Estimate, there: Estimate) -> Estimate:
    """Ratio of two independent ratios; relative half-widths add in squares."""
    missing = here.why_not or there.why_not
    if missing or here.value is None or there.value is None:
        return Estimate(None, why_not=missing or "the metric was not taken")
    half = math.hypot(_half(here), _half(there))
    value = here.value / there.value
    return Estimate(value, value * math.exp(-half), value * math.exp(half), min(here.n, there.n))


def _half(e: Estimate) -> float:
    if not e.value or not e.low or e.high is None:
        return 0.0
    return max(math.log(e.high / e.value), math.log(e.value / e.low))


def _pairs(metric: str, lane: LaneResults, against: LaneResults) -> tuple[list[float], list[float]]:
    mine, theirs = lane.samples.get(metric, {}), against.samples.get(metric, {})
    keys = [k for k in theirs if k in mine]
    return [mine[k] for k in keys], [theirs[k] for k in keys]


def _with_interval(found: Interval) -> Estimate:
    return Estimate(found.value, found.low, found.high, found.n, "" if found.low is not None else _ONE_PAIR)
