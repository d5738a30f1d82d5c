"""What cache policies lose: needles found, perplexity by the decode path and KL to the baseline, by share kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from studio_state.experiment import ExperimentSpec, WorkloadSpec
from studio_state.pipeline import Pipeline
from workers.bench.kv_policies import cache_policies, lane_of
from workers.bench.lanes import measure
from workers.bench.plan import Plan
from workers.bench.report import json_line
from workers.host import ModelHost

KEEPS = (0.75, 0.5, 0.25, 0.1)
NEEDLES, NEEDLE_TOKENS = 8, 256
WINDOWS, CONTEXT, SCORED = 3, 256, 64
TOGETHER = 15  # lanes beside the baseline in one experiment
FOUND, PERPLEXITY, KL = "accuracy", "perplexity", "kl_to_baseline"


@dataclass
class Row:
    """One policy at one budget."""

    policy: str
    keep: float | None
    values: dict[str, float] = field(default_factory=dict)


def bench(plan: Plan) -> None:
    """One table in Markdown; policies without the knob ``keep`` have one row, at their defaults."""
    host, quick = ModelHost(), plan.rounds <= 4
    named = cache_policies()
    plain = [n for n, cls in named.items() if "keep" not in cls.model_fields]
    rows = [Row("baseline", None)]
    needles, windows = _items(quick)
    print(f"{plan.model}: {needles} needles in {NEEDLE_TOKENS} tokens; {windows} windows of {CONTEXT} + {SCORED} tokens")
    print("| policy | keep | needles found | perplexity | KL to baseline, of the windows |\n|---|---|---|---|---|")
    budgets: list[tuple[float | None, list[str]]] = [(k, [n for n in named if n not in plain]) for k in KEEPS[-1:] if quick]
    if not quick:
        budgets = [*((k, [n for n in named if n not in plain]) for k in KEEPS), (None, plain)]
    for keep, names in ((k, some[i : i + TOGETHER]) for k, some in budgets for i in range(0, len(some), TOGETHER)):
        batch = [Row(n, keep) for n in names]
        lanes = (Pipeline(), *(lane_of(n, keep or 1.0) for n in names))
        for spec in _specs(plan, lanes, quick):
            for row, told in zip([rows[0], *batch], measure(spec, (FOUND, PERPLEXITY, KL), host), strict=True):
                row.values.update(told.means)
        rows += batch
        _tell(rows if len(rows) == len(batch) + 1 else batch)
    for row in rows:
        print(json_line("kv-quality", plan, policy=row.policy, keep=row.keep, **row.values))


def _tell(rows: list[Row]) -> None:
    """Rows of the table as soon as they are measured: the whole takes about an hour."""
    for row in rows:
        found, perplexity, kl = (row.values.get(n) for n in (FOUND, PERPLEXITY, KL))
        cells = [row.policy, "" if row.keep is None else f"{row.keep:g}", *map(_cell, (found, perplexity, kl))]
        print(f"| {' | '.join(cells)} |", flush=True)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _items(quick: bool) -> tuple[int, int]:
    """How many needles and how many windows."""
    return (2, 1) if quick else (NEEDLES, WINDOWS)


def _specs(plan: Plan, lanes: tuple[Pipeline, ...], quick: bool) -> list[ExperimentSpec]:
    """The two experiments that score these lanes."""
    needles, windows = _items(quick)
    needle = {"items": needles, "length": NEEDLE_TOKENS}
    perplexity = {"items": windows, "context": CONTEXT, "score": SCORED}
    return [
        ExperimentSpec(
            model=plan.model,
            workload=WorkloadSpec(id=workload, options=options),
            lanes=lanes,
            dtype="float32",
            threads=plan.threads,
        )
        for workload, options in (("needle", needle), ("perplexity", perplexity))
    ]
