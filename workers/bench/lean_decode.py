"""``lean-decode`` against the baseline, float32."""

from __future__ import annotations

from workers.bench.lanes import against_baseline
from workers.bench.plan import Plan


def bench(plan: Plan) -> None:
    """Print the ratio of decoded tokens per second."""
    against_baseline("lean-decode", plan, "lean-decode")
