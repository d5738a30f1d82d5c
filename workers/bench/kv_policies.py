"""What cache policies cost and bring: prefill overhead, decode speed and cache bytes against the baseline, by prompt length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from studio_state.experiment import ExperimentSpec, WorkloadSpec
from studio_state.pipeline import Pipeline, Step
from studio_state.stats import Interval
from workers.bench.lanes import LaneMetrics, dissect, measure
from workers.bench.plan import Plan
from workers.bench.report import json_line
from workers.host import ModelHost
from workers.mechanisms.operator_times import KINDS
from workers.methods import Policy, discover

LENGTHS = (1024, 4096)
LONGEST = 8160  # what a context of 8,192 tokens holds beside the new ones
AT_LONGEST = ("streamingllm", "knorm", "snapkv", "adakv", "expected-attention", "quest")
KEEP = 0.25
NEW_TOKENS = 32
TOGETHER = 6  # lanes beside the baseline in one race
DTYPE = "bfloat16"  # long prompts are read twice as fast in it as in float32 where the processor multiplies it (AMX)
PREFILL, DECODE, BYTES = "ttft_s", "decode_tokens_per_s", "kv_bytes"


def bench(plan: Plan) -> None:
    """A table a length: each policy with ``keep`` = a quarter where it has this knob, else at its defaults."""
    short = replace(plan, pairs=min(plan.pairs, 3), new_tokens=min(plan.new_tokens, NEW_TOKENS))
    host, names = ModelHost(), list(cache_policies())
    lengths = [(n, names) for n in LENGTHS] if plan.rounds > 4 else [(256, names)]
    if plan.rounds > 4:
        lengths.append((LONGEST, [n for n in names if n in AT_LONGEST]))
    slow: list[str] = []
    for length, policies in lengths:
        print(f"prompt of {length} tokens in {DTYPE}, against the baseline:\n")
        print("| policy | time to first token | decode speed | cache bytes |\n|---|---|---|---|", flush=True)
        for name, lane, base in _raced(short, length, policies, host):
            ratios = {m: lane.ratios[m] for m in (PREFILL, DECODE)}
            share = lane.means[BYTES] / base.means[BYTES]
            told = (f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in ratios.values())
            print(f"| {name} | {' | '.join(told)} | {share:.2f} |", flush=True)
            print(json_line("kv-policies", short, policy=name, prompt_tokens=length, bytes=share, **plain(ratios)), flush=True)
            if length == max(LENGTHS) and share <= 0.5 and ratios[DECODE].value < 1:
                slow.append(name)
    if slow:
        _tell_why(short, slow, host)


def _tell_why(plan: Plan, slow: Sequence[str], host: ModelHost) -> None:
    """Where a decode step of the slow ones spends its time, beside the baseline's."""
    found = dissect(_spec(plan, max(LENGTHS), slow, 1), host)
    print(f"slower than the baseline at {max(LENGTHS)} tokens although they keep half or less; milliseconds of a decode step:\n")
    print(f"| policy | whole step | {' | '.join(KINDS.values())} |\n|---|---|{'---|' * len(KINDS)}")
    for name, step in zip(("baseline", *slow), found, strict=True):
        cells = (f"{1e3 * s:.1f} ({s / step['seconds']:.0%})" for s in (step["kinds"][k] for k in KINDS))
        print(f"| {name} | {1e3 * step['seconds']:.1f} | {' | '.join(cells)} |", flush=True)


def cache_policies() -> dict[str, type[Policy]]:
    """Policies of language models that change what the cache holds or what is read of it."""
    return {
        name: cls
        for name, cls in discover().items()
        if "llm" in cls.card.families and (cls.card.stage == "kv" or any(r.resource == "kv.length" for r in cls.card.resources))
    }


def plain(ratios: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    """Ratios with their intervals, as JSON holds them."""
    return {name: {"ratio": r.value, "low": r.low, "high": r.high} for name, r in ratios.items()}


def lane_of(name: str, keep: float) -> Pipeline:
    """A policy alone, at this budget where it has one."""
    has = "keep" in discover()[name].model_fields
    return Pipeline(steps=(Step(policy=name, knobs={"keep": keep} if has else {}),))


def _raced(plan: Plan, length: int, names: list[str], host: ModelHost) -> Iterator[tuple[str, LaneMetrics, LaneMetrics]]:
    """(policy, its lane, the baseline's lane), a few policies a race."""
    for start in range(0, len(names), TOGETHER):
        some = names[start : start + TOGETHER]
        base, *lanes = measure(_spec(plan, length, some, plan.pairs), (PREFILL, DECODE, BYTES), host)
        yield from ((n, lane, base) for n, lane in zip(some, lanes, strict=True))


def _spec(plan: Plan, length: int, names: Sequence[str], repeats: int) -> ExperimentSpec:
    """These policies against the baseline on one prompt."""
    options = {"items": 1, "prompt_tokens": length, "new_tokens": plan.new_tokens}
    return ExperimentSpec(
        model=plan.model,
        workload=WorkloadSpec(id="speed", options=options),
        lanes=(Pipeline(), *(lane_of(n, KEEP) for n in names)),
        dtype=DTYPE,
        threads=plan.threads,
        repeats=repeats,
    )
