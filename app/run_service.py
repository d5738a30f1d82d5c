"""Checking, starting, watching and cancelling experiments: what the page and the API both do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.compose import local_models_in_knobs, make_spec, path_problems, read_lanes
from app.context import Context
from app.live import Visitor
from app.race import Race
from app.race_view import head, table
from studio_state.errors import SpecError, StudioError
from studio_state.experiment import ExperimentSpec
from studio_state.pipeline import Pipeline, Step
from studio_state.problems import Problem, pipeline_problems, problems


def all_problems(ctx: Context, spec: ExperimentSpec) -> list[Problem]:
    """Everything that keeps the experiment from running, as far as this process can tell."""
    return refusals(ctx, spec) + problems(spec, ctx.catalog, ctx.models.known(spec.model), ctx.unavailable(spec.device))


def refusals(ctx: Context, spec: ExperimentSpec) -> list[Problem]:
    """What the host does not let visitors ask for."""
    if ctx.hosted is not None:
        return ctx.hosted.problems(spec, ctx.catalog)
    if ctx.local_paths:
        return []
    found = path_problems(spec.model, spec.workload.options, spec.workload.id, ctx.catalog)
    if spec.trust_remote_code:
        message = "code that a model brings along is not run for visitors; leave trust_remote_code off and choose a model that transformers knows"
        found.append(Problem(message=message, knob="trust_remote_code"))
    return found + local_models_in_knobs(spec.lanes, ctx.catalog)


def start(ctx: Context, spec: ExperimentSpec, owner: str, origin: str = "studio") -> str:
    """Submit an experiment; returns its id.

    Raises:
        SpecError: it cannot run; all problems.
        StudioError: the queue is full, or it cannot be recorded.
    """
    found = all_problems(ctx, spec)
    if found:
        raise SpecError(found)
    experiment = ctx.dispatch.submit(spec, owner=owner, origin=origin)
    ctx.recent.add(experiment)
    return experiment


def fits(ctx: Context, model: str, workload: str, device: str) -> dict[str, str]:
    """Policy id -> why it does not fit this model, workload or device whatever its knobs."""
    info, unavailable = ctx.models.known(model or ""), ctx.unavailable(device)
    reasons: dict[str, str] = {}
    for card in ctx.catalog.policies:
        found = pipeline_problems(
            Pipeline(steps=(Step(policy=card.id),)), ctx.catalog, info, workload or None, device, unavailable
        )
        reason = next((p.message for p in found if p.knob is None), None)
        if reason:
            reasons[card.id] = reason
    return reasons


def check(ctx: Context, lanes: Any, setup: Mapping[str, Any]) -> dict[str, Any]:
    """Problems of what stands in the editor, by lane (0 = baseline), and what does not fit at all.

    Args:
        lanes: pipelines as data, without the baseline.
        setup: model, workload, options, settings, device.
    """
    model, workload, device = str(setup.get("model") or ""), str(setup.get("workload") or ""), str(setup.get("device") or "cpu")
    answer: dict[str, Any] = {"lanes": [], "general": [], "fits": fits(ctx, model, workload, device)}
    try:
        own = read_lanes(lanes, keep_empty=True)
        spec = make_spec(model, workload, own, setup.get("options"), setup.get("settings"), device)
        found = all_problems(ctx, spec)
    except SpecError as e:
        return answer | {"general": [_dump(p) for p in e.problems]}
    per_lane: list[list[dict[str, Any]]] = [[] for _ in spec.lanes]
    for problem in found:
        (answer["general"] if problem.lane is None else per_lane[problem.lane]).append(_dump(problem))
    return answer | {"lanes": per_lane}


def _dump(problem: Problem) -> dict[str, Any]:
    return problem.model_dump(mode="json")


def status(ctx: Context, experiment: str, now: float) -> dict[str, Any]:
    """How an experiment stands, with the numbers of every lane so far.

    Raises:
        StudioError: there is no such experiment.
    """
    race = ctx.races.get(experiment)
    if race is None:
        raise StudioError(f"there is no experiment {experiment!r} in this studio")
    line = head(race, now, ctx.dispatch.place(experiment))
    return {
        "experiment": experiment,
        "status": race.status,
        "text": line["text"],
        "done": line["done"],
        "eta_s": race.eta(now),
        "place": ctx.dispatch.place(experiment),
        "message": race.message,
        "lanes": [lane_numbers(race, i) for i in range(len(race.lanes))],
        "table": table(race)["rows"] if race.over else [],
    }


def lane_numbers(race: Race, lane: int) -> dict[str, Any]:
    """One lane in plain numbers: pipeline, status, metrics, sources, ratios."""
    entry = race.lanes[lane]
    pipeline = race.spec.lanes[lane] if race.spec and lane < len(race.spec.lanes) else Pipeline()
    metrics = {n: v for n in entry.sources if (v := entry.value(n)) is not None}
    return {
        "pipeline": pipeline.text(),
        "name": pipeline.name,
        "status": entry.status,
        "metrics": metrics,
        "sources": {n: entry.sources[n] for n in metrics},
        "ratios": {n: {"value": r.value, "low": r.low, "high": r.high, "n": r.n} for n, r in entry.ratios.items()},
        "flags": entry.flags,
    }


def cancel_for(ctx: Context, experiment: str, visitor: Visitor) -> str:
    """Cancel for the session that started it, or for the host; returns a sentence.

    Raises:
        StudioError: somebody else started it, or it has ended.
    """
    token = ctx.host_token if visitor.host else ctx.dispatch.cancel_token(experiment, visitor.owner)
    ctx.dispatch.cancel(experiment, token)
    return "Cancelling: what was measured so far is kept."


def sentences(error: StudioError, names: Sequence[str] = ()) -> list[str]:
    """An error as sentences for the page, one a problem."""
    if not isinstance(error, SpecError):
        return [sentence(str(error))]
    return [sentence(_placed(p, names)) for p in error.problems]


def _placed(problem: Problem, names: Sequence[str]) -> str:
    if problem.lane is None or problem.lane >= len(names):
        return problem.message if problem.lane is None else problem.sentence()
    return f"{names[problem.lane]}: {problem.message}"


def sentence(text: str) -> str:
    """A text with a capital letter in front and a full stop behind."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
