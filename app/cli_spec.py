"""From the words on the command line to an ExperimentSpec. Pure, but for reading ``@file`` pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from studio_state.catalog import Card, Catalog
from studio_state.errors import SpecError
from studio_state.experiment import MAX_LANES, ExperimentSpec
from studio_state.pipeline import Pipeline, parse_pipeline, scalar, split_outside_quotes, sweep
from studio_state.problems import Problem, nearest, problems, schema_problems


def parse_settings(settings: Sequence[str], option: str = "--set", example: str = "items=20") -> dict[str, Any]:
    """``--set items=20`` -> ``{"items": 20}``.

    Raises:
        SpecError: one of them is not ``name=value``.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        name, sign, value = setting.partition("=")
        if not sign or not name.strip():
            raise SpecError(f"cannot read {option} {setting!r}: write name=value, for example {option} {example}")
        found[name.strip()] = scalar(value)
    return found


def parse_sweep(text: str) -> tuple[str, str, list[Any]]:
    """``snapkv.keep=0.1,0.25`` -> policy, knob, values.

    Raises:
        SpecError: it is written in another way.
    """
    target, _, values = text.partition("=")
    policy, _, knob = target.strip().partition(".")
    parts = [v.strip() for v in split_outside_quotes(values, ",") if v.strip()]
    if not policy or not knob or not parts:
        raise SpecError(
            f"cannot read --sweep {text!r}: write policy.knob=value,value, for example --sweep snapkv.keep=0.1,0.25,0.5"
        )
    return policy, knob, [scalar(v) for v in parts]


def build_lanes(lanes: Sequence[str], sweeps: Sequence[str]) -> list[Pipeline]:
    """The pipelines of ``--lane``, multiplied by ``--sweep``; the baseline is always first.

    Raises:
        SpecError: all lanes and sweeps that cannot be read, or a sweep over a policy that no lane has.
    """
    found: list[Problem] = []
    pipelines: list[Pipeline] = []
    for text in lanes:
        try:
            pipelines.append(parse_pipeline(text))
        except SpecError as e:
            found += e.problems
    for text in sweeps:
        try:
            policy, knob, values = parse_sweep(text)
        except SpecError as e:
            found += e.problems
            continue
        if not any(step.policy == policy for p in pipelines for step in p.steps):
            found.append(Problem(message=f"--sweep {text}: no lane contains {policy!r}; add --lane {policy}"))
        pipelines = sweep(pipelines, policy, knob, values)
    if not pipelines or pipelines[0].steps:
        pipelines.insert(0, Pipeline())
    if len(pipelines) > MAX_LANES:
        found.append(
            Problem(message=f"{len(pipelines)} lanes with the baseline; at most {MAX_LANES} are allowed, sweep fewer values")
        )
    if found:
        raise SpecError(found)
    return pipelines


def make_spec(data: Mapping[str, Any]) -> ExperimentSpec:
    """Validate the fields of a spec; refusals as sentences about the options.

    Raises:
        SpecError: all fields that are out of range.
    """
    try:
        return ExperimentSpec.model_validate(data)
    except ValidationError as e:
        raise SpecError([_sentence(dict(error)) for error in e.errors()]) from e


def _sentence(error: Mapping[str, Any]) -> Problem:
    name = "-".join(str(part) for part in error["loc"] if part != "sampling").replace("_", "-")
    message = str(error["msg"]).removeprefix("Value error, ")
    if not name:
        return Problem(message=message)
    given = "" if isinstance(error["input"], dict) else f" {error['input']!r}"
    return Problem(message=f"--{name}{given} is not allowed: {message[:1].lower()}{message[1:]}", knob=name)


def recipe_request(recipe: str, knobs: Sequence[str], catalog: Catalog) -> tuple[Card, dict[str, Any]]:
    """The card of a recipe, and its knobs as values.

    Raises:
        SpecError: there is no such recipe, or the knobs that cannot be read or are not allowed.
    """
    card = next((c for c in catalog.recipes if c.id == recipe), None)
    if card is None:
        ids = [c.id for c in catalog.recipes]
        raise SpecError(f"there is no recipe {recipe!r}; {nearest(recipe, ids)}allowed: {', '.join(ids)}")
    values = parse_settings(knobs, "--knob", "steps=1000")
    if found := schema_problems(values, card.knobs, card.id):
        raise SpecError([Problem(message=message, knob=name or None) for name, message in found])
    return card, values


def check(spec: ExperimentSpec, catalog: Catalog) -> None:
    """Refuse at once what can be refused without the model; the worker checks again with it.

    Raises:
        SpecError: all problems.
    """
    if found := problems(spec, catalog):
        raise SpecError(found)
