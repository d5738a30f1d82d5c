"""The baseline lane against the library's bare greedy ``generate``: alternating processes, nothing shared.

A speed is (tokens - 1) over T(all new tokens) - T(1 new token), so prompt, start and end cost cancel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from statistics import median
from typing import Any

from studio_state.errors import StudioError
from studio_state.stats import ratio_interval
from workers.bench.plan import Plan
from workers.bench.report import json_line, ratio_line


def bench(plan: Plan) -> None:
    """Print medians of both and the ratio from alternating pairs."""
    runs: dict[str, list[dict[str, Any]]] = {"baseline": [], "generate": []}
    for pair in range(plan.pairs):
        for who in ("baseline", "generate") if pair % 2 == 0 else ("generate", "baseline"):
            runs[who].append(_child(plan, who))
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


def _child(plan: Plan, who: str) -> dict[str, Any]:
    """Time one of the two in a process of its own.

    Raises:
        StudioError: the process failed; its last words are the message.
    """
    command = [sys.executable, "-m", "workers.bench.decode_once", who, plan.model]
    command += [str(plan.threads), str(plan.prompt_tokens), str(plan.new_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        raise StudioError(f"{who} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
