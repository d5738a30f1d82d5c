"""The baseline lane against the library's bare greedy ``generate``: alternating processes, nothing shared.

A speed is (tokens - 1) over T(all new tokens) - T(1 new token), so prompt, start and end cost cancel.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from studio_state.stats import ratio_interval
from workers.bench.children import answer
from workers.bench.plan import Plan
from workers.bench.report import json_line, ratio_line


def bench(plan: Plan) -> None:
    """Print medians of both and the ratio from alternating pairs."""
    runs: dict[str, list[dict[str, Any]]] = {"baseline": [], "generate": []}
    for pair in range(plan.pairs):
        for who in ("baseline", "generate") if pair % 2 == 0 else ("generate", "baseline"):
            sizes = (plan.model, plan.threads, plan.prompt_tokens, plan.new_tokens)
            runs[who].append(answer(who, "decode_once", who, *sizes))
    speeds = {who: [r["tokens_per_s"] for r in found] for who, found in runs.items()}
    medians = {who: median(found) for who, found in speeds.items()}
    ratio = ratio_interval(speeds["baseline"], speeds["generate"])
    same = all(r["tokens"] == runs["generate"][0]["tokens"] for found in runs.values() for r in found)
    print(
        f"baseline lane: {medians['baseline']:.1f}, generate: {medians['generate']:.1f} tokens/s (medians); same tokens: {same}"
    )
    print(ratio_line("baseline / generate", ratio))
    print(
        json_line(
            "generate", plan, medians=medians, ratio=ratio.value, low=ratio.low, high=ratio.high, n=ratio.n, same_tokens=same
        )
    )
