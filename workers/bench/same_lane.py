"""A/A test: the baseline against itself. How often does the 95 % interval of the ratio cover 1?"""

from __future__ import annotations

from dataclasses import replace

from studio_state.errors import StudioError
from workers.bench.lanes import race
from workers.bench.plan import Plan
from workers.bench.report import json_line, ratio_line
from workers.host import ModelHost

SHORT = 16  # new tokens of a run: many short races rather than few long ones
PAIRS = 5


def bench(plan: Plan) -> None:
    """Print every interval, and the share of those that cover 1."""
    short = replace(plan, new_tokens=min(SHORT, plan.new_tokens), pairs=min(PAIRS, plan.pairs))
    host, covered, ratios = ModelHost(), 0, []
    for number in range(plan.rounds):
        ratio = race(short, ["baseline"], host=host)[1].ratio
        if ratio is None or ratio.low is None or ratio.high is None:
            raise StudioError("the engine gave no interval; an A/A test needs at least two pairs")
        covers = ratio.low <= 1 <= ratio.high
        covered += covers
        ratios.append(ratio.value)
        print(ratio_line(f"race {number + 1} of {plan.rounds}", ratio) + ("" if covers else "  does not cover 1"))
    print(f"{covered} of {plan.rounds} intervals cover 1")
    print(json_line("same-lane", short, rounds=plan.rounds, covered=covered, ratios=ratios))
