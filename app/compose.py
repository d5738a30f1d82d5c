"""From what stands on the page (or in a link, or in an API call) to an experiment, with all problems in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.components.knob_form import part_of_schema
from app.components.lanes import MAX_OWN_LANES
from studio_state import zoo
from studio_state.catalog import Catalog
from studio_state.errors import SpecError
from studio_state.experiment import ExperimentSpec
from studio_state.pipeline import Pipeline, parse_pipeline, pipeline_from_data
from studio_state.problems import Problem
from studio_state.speed_story import DISSECTION, ROOFLINE

SETTINGS = (
    "max_new_tokens", "repeats", "batch", "threads", "dtype", "seed", "eos", "attention", "chunk_size", "chat_template", "isolate",
)  # fmt: skip
ANALYZERS = (DISSECTION, ROOFLINE)  # what looks into every lane after a race that the screen starts
SETTING_HELP = {
    "max_new_tokens": "tokens generated per item; empty = the workload's own number",
    "repeats": "how often every item is timed in every lane; more = narrower intervals",
    "batch": "items that run together",
    "threads": "CPU threads; empty = all cores",
    "dtype": "number format of unquantized weights; auto = float32 on a CPU, the file's own on a GPU",
    "seed": "the same seed gives the same items, and the same noise for pictures",
    "eos": "stop at the end-of-sequence token, or always generate the full number",
    "attention": "attention kernel, the same in every lane",
    "chunk_size": "prompt tokens per prefill step; empty = the whole prompt at once",
    "chat_template": "wrap prompts in the model's own chat template",
    "isolate": "a fresh worker process for every lane; slower, but memory cannot leak from lane to lane",
}


def settings_schema() -> dict[str, Any]:
    """JSON Schema of the settings of an experiment that the page offers."""
    return part_of_schema(ExperimentSpec.model_json_schema(), SETTINGS, SETTING_HELP)


def make_spec(
    model: str,
    workload: str,
    lanes: Sequence[Pipeline],
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> ExperimentSpec:
    """An experiment whose lane 0 is the baseline and whose other lanes are the given ones.

    Raises:
        SpecError: every field that is missing or out of range, in words.
    """
    if not (model or "").strip():
        raise SpecError("choose a model: one of the list, a Hub id such as org/name, or a folder on this machine")
    data = {
        "model": model.strip(),
        "workload": {"id": workload or "", "options": dict(options or {})},
        "lanes": [Pipeline(), *lanes],
        "device": device,
        "analyzers": ANALYZERS,
        **(settings or {}),
    }
    try:
        return ExperimentSpec.model_validate(data)
    except ValidationError as e:
        raise SpecError([_field_problem(error) for error in e.errors()]) from e


def _field_problem(error: Any) -> Problem:
    name = ".".join(str(part) for part in error["loc"] if part != "lanes") or "experiment"
    given = error.get("input")
    shown = (
        f"{name} = {given!r} is not allowed"
        if isinstance(given, (str, int, float, bool)) or given is None
        else f"{name} is not allowed"
    )
    return Problem(message=f"{shown}: {error['msg'][:1].lower()}{error['msg'][1:]}", knob=name)


def read_lanes(data: Any, keep_empty: bool = False) -> list[Pipeline]:
    """Lanes from the editor, a link or an API call: pipelines as data or as one line of text.

    Args:
        keep_empty: keep lanes without a policy, so that positions stay those of the page.

    Raises:
        SpecError: not a list of pipelines, or too many.
    """
    if not isinstance(data, list):
        raise SpecError(f"lanes must be a list of pipelines, not {type(data).__name__}")
    lanes = [parse_pipeline(p) if isinstance(p, str) else pipeline_from_data(p, f"lane {i + 1}") for i, p in enumerate(data)]
    lanes = [p for p in lanes if p.steps or keep_empty]
    if len(lanes) > MAX_OWN_LANES:
        raise SpecError(f"{len(lanes)} lanes were given; at most {MAX_OWN_LANES} run beside the baseline, remove some")
    return lanes


def is_local(model: str) -> bool:
    """True if this names something on the studio's machine rather than a zoo or Hub id."""
    text = model.strip()
    if zoo.find(text) is not None:
        return False
    looks = text.startswith((".", "/", "~", "\\")) or text.lower().endswith(".gguf") or text[1:2] == ":"
    return looks or Path(text).expanduser().exists()


def models_in_knobs(lanes: Sequence[Pipeline], catalog: Catalog) -> Iterator[tuple[Problem, str]]:
    """Every model that a policy's knob names (the draft of speculative decoding): where it stands, and its name."""
    for lane, pipeline in enumerate(lanes):
        for at, step in enumerate(pipeline.steps):
            card = catalog.by_id.get(step.policy)
            for name, value in step.knobs.items():
                prop = card.knobs.get("properties", {}).get(name, {}) if card else {}
                if prop.get("format") == "path" and value:
                    yield Problem(message="", lane=lane, step=at, policy=step.policy, knob=name), str(value)


def local_models_in_knobs(lanes: Sequence[Pipeline], catalog: Catalog) -> list[Problem]:
    """Those of them that would be opened by their path, where files of the host are off limits."""
    sentence = "models cannot be opened by path here ({!r}); choose one of the list or a Hub id such as org/name"
    return [
        place.model_copy(update={"message": f"{place.policy}: {place.knob}: " + sentence.format(value)})
        for place, value in models_in_knobs(lanes, catalog)
        if is_local(value)
    ]


def path_problems(model: str, options: Mapping[str, Any], workload: str, catalog: Catalog) -> list[Problem]:
    """What a visitor may not do where files of the host are off limits: open a model or a workload file by its path."""
    found = []
    if model and is_local(model):
        found.append(
            Problem(
                message=f"models cannot be opened by path here ({model!r}); choose one of the list or a Hub id such as org/name",
                knob="model",
            )
        )
    card = catalog.workload_by_id.get(workload)
    for name, value in options.items():
        prop = (card.options if card else {}).get("properties", {}).get(name, {})
        named = value in prop.get("examples", ())  # a word for data of the studio's own
        if (
            value
            and not named
            and (name == "file" or name.endswith("_file") or prop.get("format") in ("path", "file-path", "directory-path"))
        ):
            found.append(
                Problem(
                    message=f"files of the host cannot be opened here; leave {name} empty, or give the text itself", knob=name
                )
            )
    return found
