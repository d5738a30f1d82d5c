"""What fewer bits a weight cost: SQNR of the weights, quality of the task, distance to the baseline; methods and bits by family.

Every lane runs through the engine's own race, one lane at a time: nothing here is a time, so nothing has to be interleaved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from studio_state.errors import StudioError
from studio_state.experiment import ExperimentSpec, WorkloadSpec
from studio_state.pipeline import Pipeline, Step
from studio_state.stats import Interval, paired_bootstrap, paired_shares
from workers.bench.plan import Plan
from workers.bench.report import json_line
from workers.bench.untimed import Untimed
from workers.data.novels import held_out
from workers.environment import use_threads
from workers.host import ModelHost
from workers.lanes import Lane
from workers.mechanisms.expert_linears import ExpertLinears
from workers.mechanisms.linear import Convolved, Replacement, matrix_of
from workers.mechanisms.weight_places import places
from workers.mechanisms.weight_policy import WeightPolicy, targets, weight_metrics
from workers.session import Session

BITS, QUICK_BITS = (8, 4, 3, 2), (4,)
METHODS = ("rtn", "hqq", "gptq", "awq")  # the others are held against the first
CONTEXT, SCORED = 256, 256  # tokens of a window
STEPS = 10  # of a drawing
PERPLEXITY, ACCURACY, AGREEMENT, KL, PSNR = "perplexity", "accuracy", "class_agreement", "kl_to_baseline", "psnr"
SQNR, BYTES, MAPS = "sqnr_db", "weight_bytes", "replaced_modules"
TITLES = {AGREEMENT: "class agreement", KL: "KL to baseline", PSNR: "PSNR to baseline, dB"}  # where the name will not do


@dataclass(frozen=True)
class Case:
    """One model and what it is measured with.

    Attributes:
        items: how many.
        task: the metric of the workload.
        distance: the metric that tells how far from the baseline a lane is.
    """

    model: str
    workload: str
    items: int
    task: str
    distance: str = KL
    batch: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """How much is measured, in words."""
        if self.task == PERPLEXITY:
            return f"{self.items} windows of {self.options['context']} + {self.options['score']} tokens"
        return f"{self.items} pictures in {STEPS} steps" if self.task == AGREEMENT else f"{self.items} items"

    def spec(self, plan: Plan) -> ExperimentSpec:
        """The experiment of the baseline; an experiment takes fewer lanes than there are methods times bits."""
        return ExperimentSpec(
            model=self.model,
            workload=WorkloadSpec(id=self.workload, options={**self.options, "items": self.items}),
            dtype="float32",
            threads=plan.threads,
            batch=self.batch,
        )


@dataclass
class Row:
    """One method with one number of bits.

    Attributes:
        bits: 0 of the baseline.
        values: metric -> value of the lane.
        task: the task's metric against the baseline's: a ratio of perplexities, else a difference of shares.
        against_first: the distance less that of the first method with as many bits, where both replace the same maps.
        message: why it could not be measured.
    """

    method: str
    bits: int = 0
    values: dict[str, float] = field(default_factory=dict)
    task: Interval | None = None
    against_first: Interval | None = None
    message: str = ""


def bench(plan: Plan) -> None:
    """A table in Markdown for each model, its rows as they come, and a line of JSON for each row below it.

    Raises:
        StudioError: a model is not there, or its baseline fails.
    """
    host = ModelHost()
    use_threads(plan.threads)
    bits = QUICK_BITS if plan.rounds <= 4 else BITS
    with TemporaryDirectory() as folder:
        unread = Path(folder) / "unread.txt"
        unread.write_text(unread_text(), encoding="utf-8")
        todo = [(case, case.spec(plan)) for case in cases(plan, str(unread))]
        for _, spec in todo:
            host.inspect(spec)  # a name that is none should not be found after all the others
        for case, spec in todo:
            print(f"\n{case.model}: {case.workload}, {case.what}\n")
            rows = list(told(case, measured(case, spec, host, bits)))
            for row in rows:
                print(_json(plan, case, row), flush=True)
            host.unload()


def cases(plan: Plan, unread: str) -> list[Case]:
    """The models of each family; the one that the plan names comes last. A smoke run has one small model a family.

    Args:
        unread: file with a text that no model of the novels was trained on, and no policy is calibrated on.
    """
    text = {"context": CONTEXT, "score": SCORED, "file": unread}
    target, moe, hybrid = (
        Case(m, "perplexity", 8, PERPLEXITY, options=text) for m in ("austen-target", "austen-moe", "austen-hybrid")
    )
    seen, told_apart = Case("scene-vlm", "vqa", 36, ACCURACY), Case("fashion-vit", "classify", 500, ACCURACY, batch=50)
    drawn, unet = (
        Case(m, "generate-images", 20, AGREEMENT, PSNR, batch=20, options={"steps": STEPS})
        for m in (plan.drawing_model, "fashion-unet")
    )
    if plan.rounds <= 4:
        return [replace(case, items=2) for case in (target, seen, told_apart, drawn)]
    asked = Case(plan.model, "perplexity", 4, PERPLEXITY, options={**text, "score": SCORED // 2})
    return [target, moe, hybrid, seen, told_apart, drawn, unet, asked]


def unread_text() -> str:
    """The second half of the held-out text; policies of language models are calibrated on the beginning of the first."""
    text = held_out()
    return text[len(text) // 2 :]


# -- measuring -------------------------------------------------------------------------------
def measured(case: Case, spec: ExperimentSpec, host: ModelHost, bits: Sequence[int]) -> Iterator[Row]:
    """The baseline, then a row for each method, by bits.

    Args:
        spec: the experiment of the baseline.

    Raises:
        StudioError: the model is not there, or its baseline fails.
    """
    asked = [Pipeline(steps=(Step(policy=m, knobs={"bits": b}),)) for b in bits for m in METHODS]
    untimed = Untimed(spec, host, asked)
    base, lanes = untimed.base, untimed.lanes
    yield Row("baseline", values=_run(untimed, base, case))
    plain: dict[int, Lane] = {}
    for lane in lanes:
        (step,) = lane.pipeline.steps
        row = Row(step.policy, step.knobs["bits"])
        try:
            row.values = _run(untimed, lane, case)
        except StudioError as e:
            row.message = str(e)
        else:
            row.task = against_baseline(lane, base, case.task)
            if row.method == METHODS[0]:
                plain[row.bits] = lane
            elif row.bits in plain and plain[row.bits].given[MAPS] == lane.given[MAPS]:
                row.against_first = difference(lane, plain[row.bits], case.distance)
        yield row


def _run(untimed: Untimed, lane: Lane, case: Case) -> dict[str, float]:
    """What was measured of a lane and of its weights.

    Raises:
        StudioError: it failed.
    """
    values: dict[str, float] = {}
    untimed.run(lane, lambda session, built: values.update(_of_weights(session, built)))
    lane.given.update(values)
    return {n: lane.given[n] for n in (MAPS, BYTES, SQNR, case.task, case.distance) if n in lane.given}


def _of_weights(session: Session, lane: Lane) -> dict[str, float]:
    """Bytes of the lane's weights, how many maps are replaced, and the SQNR over these; the lane's policies are built here."""
    before = _maps(session, lane)
    with lane.attached(prepare=True):
        told = {n: v for n, v in weight_metrics(session).items() if n in (BYTES, MAPS)}
        after = {n: session.model.get_submodule(n) for n in before}
        changed = [n for n, m in after.items() if _is_replacement(m)]
        if changed:
            told[SQNR] = sqnr((matrix_of(before[n]).detach(), matrix_of(after[n])) for n in changed)
    return told


def _maps(session: Session, lane: Lane) -> dict[str, nn.Module]:
    """The maps that the lane may replace, as they are now; experts' maps under their own names."""
    policies = [p for p in lane.policies if isinstance(p, WeightPolicy)]
    opened: dict[str, nn.Module] = {n: ExpertLinears.of(session.model.get_submodule(n)) for n in places(session).experts}
    with session.swapped(opened):
        return {n: session.model.get_submodule(n) for p in policies for n in targets(session, p)}


def _is_replacement(module: nn.Module) -> bool:
    inner = module.inner if isinstance(module, Convolved) else module
    return isinstance(inner, Replacement) and inner.replaces > 0


def sqnr(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Signal to quantization noise of some matrices together, in decibels: 10 log10(sum of w^2 / sum of (w - q)^2).

    Args:
        pairs: weights before (w) and after (q), of the same shape.

    Returns:
        infinity where nothing changed.

    Raises:
        ValueError: there is no weight other than zero.
    """
    signal = noise = 0.0
    for w, q in pairs:
        exact = w.double()
        signal += float(exact.square().sum())
        noise += float((exact - q.double()).square().sum())
    if not signal:
        raise ValueError("sqnr: give weights that are not all zero")
    return 10 * math.log10(signal / noise) if noise else math.inf


def against_baseline(lane: Lane, base: Lane, task: str) -> Interval | None:
    """The task's metric against the baseline's on the same items: the ratio of perplexities, else the difference of shares."""
    if task == PERPLEXITY:
        found = difference(lane, base, "nll")
        return found and Interval(*(None if x is None else math.exp(x) for x in (found.value, found.low, found.high)), found.n)
    answers = [(a.correct, b.correct) for a, b in zip(lane.grades, base.grades, strict=True)]
    judged = [(a, b) for a, b in answers if a is not None and b is not None]
    return paired_shares([a for a, _ in judged], [b for _, b in judged]) if judged else None


def difference(lane: Lane, other: Lane, metric: str) -> Interval | None:
    """Mean difference of a metric's values on the items that both lanes have one for, with a 95 % interval."""
    mine, theirs = lane.samples.get(metric, {}), other.samples.get(metric, {})
    both = [k for k in mine if k in theirs]
    return paired_bootstrap([mine[k] for k in both], [theirs[k] for k in both]) if both else None


# -- telling ---------------------------------------------------------------------------------
def told(case: Case, rows: Iterable[Row]) -> Iterator[Row]:
    """Print rows of the table as they come, and hand them on."""
    task, distance = (TITLES.get(name, name) for name in (case.task, case.distance))
    over = "× baseline" if case.task == PERPLEXITY else "− baseline"
    print(f"| method | bits | maps | bytes | SQNR, dB | {task} | {over} [95 %] | {distance} | − {METHODS[0]}'s [95 %] |")
    print(f"|{'---|' * 9}", flush=True)
    whole, far, further = math.nan, *((".1f", ".1f") if case.distance == PSNR else (".3g", ".2g"))
    for row in rows:
        mine = row.values
        whole = mine.get(BYTES, whole) if not row.bits else whole
        share = mine[BYTES] / whole if mine else None
        cells = [row.method, str(row.bits or ""), _cell(mine.get(MAPS), ".0f"), _cell(share, ".3f"), _cell(mine.get(SQNR), ".1f")]
        cells += [_cell(mine.get(case.task), ".3f"), _cell(row.task, ".3f"), _cell(mine.get(case.distance), far)]
        print(f"| {' | '.join(cells)} | {row.message or _cell(row.against_first, further)} |", flush=True)
        yield row


def _cell(value: float | Interval | None, form: str) -> str:
    """A number, one with its interval, or nothing."""
    if isinstance(value, Interval):
        between = "" if value.low is None or value.high is None else f" [{value.low:{form}}, {value.high:{form}}]"
        return f"{value.value:{form}}{between}"
    return "" if value is None else format(value, form)


def _json(plan: Plan, case: Case, row: Row) -> str:
    """One row for machines; what was not measured is not in it."""
    found = {"task_against_baseline": row.task, f"{case.distance}_against_{METHODS[0]}": row.against_first}
    told = {n: [i.value, i.low, i.high, i.n] for n, i in found.items() if i is not None}
    values = {n: v for n, v in row.values.items() if math.isfinite(v)}
    more = {"message": row.message} if row.message else {}
    return json_line("weight-quality", plan, model=case.model, method=row.method, bits=row.bits or None, **values, **told, **more)
