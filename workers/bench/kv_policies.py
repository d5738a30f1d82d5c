"""What cache policies cost and bring: prefill overhead, decode speed and cache bytes against the baseline, by prompt length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from studio_state.experiment import ExperimentSpec, WorkloadSpec
from studio_state.pipeline import Pipeline, Step
from workers.bench.lanes import LaneMetrics, measure
from workers.bench.plan import Plan
from workers.bench.report import json_line
from workers.host import ModelHost
from workers.methods import Policy, discover

LENGTHS = (1024, 4096)
LONGEST = 8192
AT_LONGEST = ("streamingllm", "knorm", "snapkv", "adakv", "h2o", "quest")
KEEP = 0.25
NEW_TOKENS = 32
TOGETHER = 5  # lanes beside the baseline in one race
PREFILL, DECODE, BYTES = "ttft_s", "decode_tokens_per_s", "kv_bytes"


def bench(plan: Plan) -> None:
    """A table a length: each policy with ``keep`` = a quarter where it has this knob, else at its defaults."""
    short = replace(plan, pairs=min(plan.pairs, 3), new_tokens=min(plan.new_tokens, NEW_TOKENS))
    host, names = ModelHost(), list(cache_policies())
    lengths = [(n, names) for n in LENGTHS] if plan.rounds > 4 else [(256, names)]
    if plan.rounds > 4:
        lengths.append((LONGEST, [n for n in names if n in AT_LONGEST]))
    slow: dict[str, float] = {}
    for length, policies in lengths:
        print(
            f"prompt of {length} tokens: policy, time to first token / baseline, decode speed / baseline, cache bytes / baseline"
        )
        for name, lane, base in _raced(short, length, policies, host):
            ratios = {m: lane.ratios[m].value for m in (PREFILL, DECODE) if m in lane.ratios}
            share = lane.means[BYTES] / base.means[BYTES]
            print(f"{name:20} {ratios[PREFILL]:6.2f} {ratios[DECODE]:6.2f} {share:6.2f}", flush=True)
            print(json_line("kv-policies", short, policy=name, prompt_tokens=length, bytes=share, **ratios), flush=True)
            if length == max(LENGTHS) and share <= 0.5 and ratios[DECODE] < 1:
                slow[name] = ratios[DECODE]
    if slow:
        print(f"slower than the baseline at {max(LENGTHS)} tokens although they keep half or less: " + ", ".join(slow))


def cache_policies() -> dict[str, type[Policy]]:
    """Policies of language models that change what the cache holds or what is read of it."""
    return {
        name: cls
        for name, cls in discover().items()
        if "llm" in cls.card.families and (cls.card.stage == "kv" or any(r.resource == "kv.length" for r in cls.card.resources))
    }


def lane_of(name: str, keep: float) -> Pipeline:
    """A policy alone, at this budget where it has one."""
    has = "keep" in discover()[name].model_fields
    return Pipeline(steps=(Step(policy=name, knobs={"keep": keep} if has else {}),))


def _raced(plan: Plan, length: int, names: list[str], host: ModelHost) -> Iterator[tuple[str, LaneMetrics, LaneMetrics]]:
    """(policy, its lane, the baseline's lane), a few policies a race."""
    options = {"items": 1, "prompt_tokens": length, "new_tokens": plan.new_tokens}
    for start in range(0, len(names), TOGETHER):
        some = names[start : start + TOGETHER]
        spec = ExperimentSpec(
            model=plan.model,
            workload=WorkloadSpec(id="speed", options=options),
            lanes=(Pipeline(), *(lane_of(n, KEEP) for n in some)),
            dtype="float32",
            threads=plan.threads,
            repeats=plan.pairs,
        )
        base, *lanes = measure(spec, (PREFILL, DECODE, BYTES), host)
        yield from ((n, lane, base) for n, lane in zip(some, lanes, strict=True))
