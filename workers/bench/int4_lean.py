"""``rtn:bits=4+lean-decode`` against the faster one of the float32 and the bfloat16 baseline.

Both number formats are raced, each lane interleaved with the baseline of its own format; the result
that counts is the one whose baseline is faster.
"""

from __future__ import annotations

from statistics import median

from workers.bench.lanes import race, tell
from workers.bench.plan import Plan

PIPELINE = "rtn:bits=4+lean-decode"


def bench(plan: Plan) -> None:
    """Print the ratio of decoded tokens per second to the faster baseline."""
    results = {dtype: race(plan, [PIPELINE], dtype) for dtype in ("float32", "bfloat16")}
    for dtype, (base, lane) in results.items():
        print(f"{dtype}: baseline {median(base.speeds):.1f}, {PIPELINE} {median(lane.speeds):.1f} tokens/s")
    faster = max(results, key=lambda dtype: median(results[dtype][0].speeds))
    base, lane = results[faster]
    tell("int4-lean", plan, base, lane, faster)
