"""Everything that keeps an experiment from running, found before weights load.

A pure function over data: the screen calls it while one edits, the worker calls it again.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal

from jsonschema import Draft202012Validator
from pydantic import BaseModel, ConfigDict, Field

from studio_state.catalog import Catalog
from studio_state.experiment import ExperimentSpec, ModelInfo, number_format
from studio_state.model_fit import model_misfits
from studio_state.pipeline import Pipeline, Step
from studio_state.resources import RESOURCES, Use, clashes

_SHOWN_CHARS = 120  # of a refused value


class Mend(BaseModel):
    """A change that would solve the problem: remove a step, set a knob, or set a field of the experiment."""

    model_config = ConfigDict(frozen=True)
    action: Literal["remove", "set", "experiment"]
    step: int = -1
    knob: str = ""
    value: Any = None
    label: str = ""


class Problem(BaseModel):
    """One reason, tied to the policy and knob that cause it.

    Attributes:
        message: what was given, what is allowed, what to do.
        lane: position in the experiment, None = the experiment itself.
        step: position in the lane's pipeline as written, None = the whole lane.
        mend: a one-click change, where there is one.
    """

    model_config = ConfigDict(frozen=True)
    message: str
    lane: int | None = None
    step: int | None = None
    policy: str | None = None
    knob: str | None = None
    mend: Mend | None = Field(default=None)

    def sentence(self) -> str:
        """The message with its place in front."""
        place = f"lane {self.lane}: " if self.lane is not None else ""
        return place + self.message


def nearest(word: str, allowed: list[str]) -> str:
    """``did you mean ...? `` with the first word that begins so or else the most alike; empty if none is."""
    close = [a for a in allowed if word and a.startswith(f"{word}-")] or difflib.get_close_matches(word, allowed, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}? " if close else ""


def schema_problems(values: Mapping[str, Any], schema: Mapping[str, Any], what: str) -> list[tuple[str, str]]:
    """(name, sentence) for every value that the JSON Schema refuses.

    Args:
        values: what was given.
        schema: JSON Schema with ``properties``.
        what: for the sentence: ``snapkv`` or ``workload needle``.
    """
    props: Mapping[str, Any] = schema.get("properties", {})
    found = []
    for name in values:
        if name not in props:
            allowed = ", ".join(props) or "none"
            found.append((name, f"{what} has no knob {name!r}; {nearest(name, list(props))}allowed: {allowed}"))
    known = {k: v for k, v in values.items() if k in props}
    for name in [k for k, v in known.items() if isinstance(v, float) and not math.isfinite(v)]:  # NaN passes every bound
        found.append((name, f"{what}: {name} = {known.pop(name)} is not allowed; allowed: {describe_range(props[name])}"))
    for error in Draft202012Validator({**schema, "required": []}).iter_errors(known):
        name = str(error.path[0]) if error.path else ""
        found.append(
            (name, f"{what}: {name} = {_shown(error.instance)} is not allowed; allowed: {describe_range(props.get(name, {}))}")
        )
    return list(dict.fromkeys(found))  # a value may break several rules of one knob


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."


def describe_range(prop: Mapping[str, Any]) -> str:
    """What a JSON Schema property allows, in words."""
    if "enum" in prop:
        return ", ".join(map(str, prop["enum"]))
    if "const" in prop:
        return str(prop["const"])
    if "anyOf" in prop:
        return " or ".join(describe_range(p) for p in prop["anyOf"])
    if prop.get("type") == "null":
        return "nothing (null)"
    kind = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "string": "text",
        "array": "a list",
    }.get(str(prop.get("type")), str(prop.get("type", "a value")))
    if "multipleOf" in prop:
        kind += f" divisible by {prop['multipleOf']}"
    low, high = prop.get("minimum", prop.get("exclusiveMinimum")), prop.get("maximum", prop.get("exclusiveMaximum"))
    if low is not None and high is not None:
        return f"{kind} from {low} to {high}"
    if low is not None:
        return f"{kind} of at least {low}"
    if high is not None:
        return f"{kind} up to {high}"
    return kind


def pipeline_problems(
    pipeline: Pipeline,
    catalog: Catalog,
    model: ModelInfo | None = None,
    workload: str | None = None,
    device: str = "cpu",
    unavailable: Mapping[str, str] | None = None,
    lane: int | None = None,
    chunked: bool = False,
    batch: int = 1,
    dtype: str = "",
) -> list[Problem]:
    """All problems of one pipeline.

    Args:
        model: None while the model is unknown; then family, traits and widths are not checked.
        unavailable: method id -> reason, from the worker's ``hello``.
        chunked: the experiment prefills in chunks, which spoils ``prefill.whole``.
        batch: items that run together.
        dtype: number format of the weights (``auto`` resolved); empty while it is unknown.
    """
    found: list[Problem] = []
    uses: list[tuple[int, list[Use]]] = []
    for i, step in enumerate(pipeline.steps):
        card = catalog.by_id.get(step.policy)

        def add(message: str, knob: str | None = None, mend: Mend | None = None, at: int = i, step: Step = step) -> None:
            found.append(Problem(message=message, lane=lane, step=at, policy=step.policy, knob=knob, mend=mend))

        remove = Mend(action="remove", step=i, label=f"Remove {card.title if card else step.policy}")
        if card is None or card.kind != "policy":
            ids = [c.id for c in catalog.policies]
            add(
                f"there is no policy {step.policy!r}; {nearest(step.policy, ids)}allowed: the {len(ids)} that the palette and `pareto-studio methods` list",
                mend=remove,
            )
            continue
        for name, message in schema_problems(step.knobs, card.knobs, card.id):
            default = card.defaults().get(name)
            mend = (
                Mend(action="set", step=i, knob=name, value=default, label=f"Set {name} to {default}")
                if name in card.knobs.get("properties", {})
                else None
            )
            add(message, name or None, mend)
        if unavailable and card.id in unavailable:
            add(f"{card.title} cannot run on this worker: {unavailable[card.id]}", mend=remove)
        if card.devices and device.partition(":")[0] not in card.devices:
            add(f"{card.title} runs on {', '.join(card.devices)} only; this experiment is on {device}", mend=remove)
        if dtype and card.dtypes and dtype not in card.dtypes:
            add(
                f"{card.title} works on {', '.join(card.dtypes)} models; this experiment is {dtype}, set dtype = {card.dtypes[0]}",
                mend=Mend(action="experiment", knob="dtype", value=card.dtypes[0], label=f"Set dtype to {card.dtypes[0]}"),
            )
        if model is not None:
            for misfit in model_misfits(card, step, model):
                value = misfit.value
                fit = Mend(action="set", step=i, knob=misfit.knob or "", value=value, label=f"Set {misfit.knob} to {value}")
                add(misfit.message, misfit.knob, remove if value is None else fit)
        if workload and card.workloads and workload not in card.workloads:
            add(f"{card.title} means nothing for workload {workload!r}; choose one of {', '.join(card.workloads)}", mend=remove)
        if card.max_batch is not None and batch > card.max_batch:
            add(
                f"{card.title} runs at most {card.max_batch} item{'s' if card.max_batch > 1 else ''} at a time, but the batch is {batch}; "
                f"set batch = {card.max_batch}",
                mend=Mend(action="experiment", knob="batch", value=card.max_batch, label=f"Set batch to {card.max_batch}"),
            )
        entries = card.uses(step.knobs)
        uses.append((i, entries))
        if chunked and any(u.resource == "prefill.whole" and u.mode == "needs" for u in entries):
            add(
                f"{card.title} needs the whole prompt in one prefill; leave the chunk size empty",
                mend=Mend(action="experiment", knob="chunk_size", value=None, label="Prefill in one piece"),
            )
    for clash in clashes(uses):
        a, b = (catalog.by_id[pipeline.steps[i].policy] for i in (clash.first, clash.second))
        what = RESOURCES[clash.resource]
        verb = {
            "both own": f"{a.title} and {b.title} both decide {what} ({clash.resource}); keep one of them"
            if a.id != b.id
            else f"{a.title} stands in the pipeline twice; keep one",
            "one owns what the other edits": f"{a.title} and {b.title} cannot share {what} ({clash.resource}); keep one of them",
            "one spoils what the other needs": f"{a.title} and {b.title} do not work together: one needs that {what}, "
            f"the other breaks it ({clash.resource}); remove one of them"
            if clash.resource in ("prefill.whole", "kv.rollback", "kv.uniform", "attention.scores")
            else f"{a.title} and {b.title} do not work together over {what} ({clash.resource}); remove one of them",
        }[clash.reason]
        problem = Problem(
            message=verb,
            lane=lane,
            step=clash.second,
            policy=b.id,
            mend=Mend(action="remove", step=clash.second, label=f"Remove {b.title}"),
        )
        if not any(p.step == problem.step and p.message.split("(")[0] == verb.split("(")[0] for p in found):
            found.append(problem)
    return found


def problems(
    spec: ExperimentSpec,
    catalog: Catalog,
    model: ModelInfo | None = None,
    unavailable: Mapping[str, str] | None = None,
) -> list[Problem]:
    """All problems of an experiment: workload and options, then every lane."""
    found: list[Problem] = []
    card = catalog.workload_by_id.get(spec.workload.id)
    if card is None:
        ids = list(catalog.workload_by_id)
        found.append(
            Problem(
                message=f"there is no workload {spec.workload.id!r}; {nearest(spec.workload.id, ids)}allowed: {', '.join(ids)}"
            )
        )
    else:
        for name, message in schema_problems(spec.workload.options, card.options, f"workload {card.id}"):
            found.append(Problem(message=message.replace("has no knob", "has no option"), knob=name or None))
        if model is not None and model.family not in card.families:
            found.append(
                Problem(
                    message=f"workload {card.id} is for {', '.join(card.families)} models; {model.name} is of family {model.family}"
                )
            )
    if spec.isolate and spec.reference and len(spec.lanes) > 2:
        found.append(
            Problem(
                message=f"isolated lanes race the baseline only, but the reference is lane {spec.reference}; "
                "take lane 0 as the reference, or run the lanes in one process",
                mend=Mend(action="experiment", knob="reference", value=0, label="Compare with the baseline"),
            )
        )
    for lane, pipeline in enumerate(spec.lanes):
        found += pipeline_problems(
            pipeline,
            catalog,
            model,
            spec.workload.id if card else None,
            spec.device,
            unavailable,
            lane,
            spec.chunk_size is not None,
            spec.batch,
            number_format(spec.dtype, model.dtype if model else "", spec.device),
        )
    return found
