"""What cache policies lose: needles found, perplexity by the decode path and KL to the baseline, by share kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from studio_state.errors import StudioError
from studio_state.experiment import ExperimentSpec, WorkloadSpec
from workers.bench.kv_policies import DTYPE, cache_policies, lane_of
from workers.bench.plan import Plan
from workers.bench.report import json_line
from workers.bench.untimed import Untimed
from workers.host import ModelHost

KEEPS = (0.75, 0.5, 0.25, 0.1)
NEEDLES, NEEDLE_TOKENS = 8, 512
WINDOWS, CONTEXT, SCORED = 3, 512, 64
FOUND, PERPLEXITY, KL = "accuracy", "perplexity", "kl_to_baseline"


@dataclass
class Row:
    """One policy at one budget.

    Attributes:
        keep: None where the policy has no such knob: it stands at its defaults.
        values: metric -> value of the lane.
        message: why it could not be measured.
    """

    policy: str
    keep: float | None = None
    values: dict[str, float] = field(default_factory=dict)
    message: str = ""


def bench(plan: Plan) -> None:
    """One table in Markdown, its rows as they come, and a line of JSON for each row below it."""
    quick = plan.rounds <= 4
    needles, windows = (2, 1) if quick else (NEEDLES, WINDOWS)
    what = f"{needles} needles in {NEEDLE_TOKENS} tokens; {windows} windows of {CONTEXT} + {SCORED} tokens; in {DTYPE}"
    print(f"{plan.model}: {what}\n")
    print(f"| policy | keep | needles found of {needles} | perplexity | KL to baseline, of the windows |")
    print("|---|---|---|---|---|", flush=True)
    done = []
    for row in measured(specs(plan, needles, windows), KEEPS[-1:] if quick else KEEPS):
        print(told(row, needles), flush=True)
        done.append(row)
    print()
    for row in done:
        more = {"message": row.message} if row.message else {}
        print(json_line("kv-quality", plan, policy=row.policy, keep=row.keep, **row.values, **more))


def specs(plan: Plan, needles: int, windows: int) -> list[ExperimentSpec]:
    """The two experiments that score every lane."""
    asked = {
        "needle": {"items": needles, "length": NEEDLE_TOKENS},
        "perplexity": {"items": windows, "context": CONTEXT, "score": SCORED},
    }
    workloads = [WorkloadSpec(id=name, options=options) for name, options in asked.items()]
    return [ExperimentSpec(model=plan.model, workload=w, dtype=DTYPE, threads=plan.threads) for w in workloads]


def measured(asked: list[ExperimentSpec], keeps: tuple[float, ...]) -> Iterator[Row]:
    """The baseline; each policy at each budget, by policy; then those without a budget.

    Args:
        asked: experiments on one model: needles, whose answers alone count, and windows.

    Raises:
        StudioError: the model is not there, or its baseline fails.
    """
    named = cache_policies()
    plain = [n for n, cls in named.items() if "keep" not in cls.model_fields]
    rows = [Row(n, k) for n in named if n not in plain for k in keeps] + [Row(n) for n in plain]
    host = ModelHost()
    pipelines = [lane_of(row.policy, row.keep or 1.0) for row in rows]
    races = [Untimed(spec, host, pipelines, compared=spec.workload.id == "perplexity") for spec in asked]
    base = Row("baseline")
    for race in races:
        base.values |= _kept(race.run(race.base))
    yield base
    for i, row in enumerate(rows):
        try:
            for race in races:
                row.values |= _kept(race.run(race.lanes[i]))
        except StudioError as e:
            row.message = str(e)
        yield row


def _kept(values: dict[str, float]) -> dict[str, float]:
    return {name: values[name] for name in (FOUND, PERPLEXITY, KL) if name in values}


def told(row: Row, needles: int) -> str:
    """A row of the table; needles as a count, which shows how fine it is."""
    found = row.values.get(FOUND)
    numbers = ["" if (value := row.values.get(name)) is None else f"{value:.3f}" for name in (PERPLEXITY, KL)]
    numbers[-1] = row.message or numbers[-1]
    cells = [row.policy, "" if row.keep is None else f"{row.keep:g}", "" if found is None else f"{found * needles:.0f}", *numbers]
    return f"| {' | '.join(cells)} |"
