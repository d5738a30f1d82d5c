"""Knobs that the model bounds: what does not fit is told with the value that would, and the mended pipeline has no problem."""

from __future__ import annotations

from typing import Any

import pytest

from app.models import zoo_info
from studio_state.catalog import Catalog
from studio_state.experiment import ExperimentSpec, ModelInfo, WorkloadSpec
from studio_state.model_fit import candidates, nearest_number
from studio_state.pipeline import Pipeline, Step, parse_pipeline
from studio_state.problems import pipeline_problems, problems

CATALOG = Catalog.load()
SMOLLM2 = ModelInfo(name="smollm2-135m", family="llm", layers=30, hidden=576, ffn=1536)  # its config.json


@pytest.mark.parametrize(
    ("policy", "knobs", "model", "value", "part"),
    [
        ("rtn", {"bits": 4, "group_size": 256}, SMOLLM2, 64, "256 does not divide the width 576 of smollm2-135m; these do: 32, 64"),
        ("rtn", {"bits": 4, "group_size": 128}, SMOLLM2, 64, "128 does not divide the width 576"),
        ("knorm", {"skip_layers": 40}, SMOLLM2, 29, "skip_layers = 40, but smollm2-135m has 30 layers (0 to 29)"),
    ],
)  # fmt: skip
def test_the_mend_is_the_nearest_value_that_fits(
    policy: str, knobs: dict[str, Any], model: ModelInfo, value: int, part: str
) -> None:
    [problem] = pipeline_problems(Pipeline(steps=(Step(policy=policy, knobs=knobs),)), CATALOG, model)
    assert part in problem.message
    assert problem.mend is not None
    assert (problem.mend.action, problem.mend.knob, problem.mend.value) == ("set", problem.knob, value)
    mended = Step(policy=policy, knobs={**knobs, problem.mend.knob: problem.mend.value})
    assert pipeline_problems(Pipeline(steps=(mended,)), CATALOG, model) == []


def test_where_no_value_fits_the_policy_is_removed() -> None:
    odd = ModelInfo(name="odd", family="llm", hidden=90, ffn=270)  # 2 * 3^2 * 5: no power of two above 2
    [problem] = pipeline_problems(Pipeline(steps=(Step(policy="rtn", knobs={"bits": 4}),)), CATALOG, odd)
    assert "no allowed group_size does" in problem.message
    assert problem.mend is not None
    assert (problem.mend.action, problem.mend.step) == ("remove", 0)


def test_a_policy_for_another_family_can_only_be_removed() -> None:
    [problem] = pipeline_problems(Pipeline(steps=(Step(policy="snapkv"),)), CATALOG, ModelInfo(name="m", family="vit"))
    assert problem.mend is not None
    assert problem.mend.action == "remove"


@pytest.mark.parametrize(
    ("device", "dtype", "stored", "message", "mend"),
    [
        ("cpu", "auto", "bfloat16", "", None),
        ("cpu", "float32", "bfloat16", "", None),
        ("cpu", "bfloat16", "float32", "works on float32 models; this experiment is bfloat16, set dtype = float32", ("experiment", "dtype", "float32")),
        ("cuda:1", "float32", "float32", "runs on cpu only; this experiment is on cuda:1", ("remove", "", None)),
    ],
)  # fmt: skip
def test_number_formats_and_devices_are_checked_before_loading(
    device: str, dtype: str, stored: str, message: str, mend: tuple[str, str, Any] | None
) -> None:
    spec = ExperimentSpec(
        model="m", workload=WorkloadSpec(id="speed"), lanes=(parse_pipeline("dynamic-int8"),), device=device, dtype=dtype
    )
    found = problems(spec, CATALOG, SMOLLM2.model_copy(update={"dtype": stored}))
    assert [message in p.message for p in found] == [True] * bool(message)
    assert [p.mend and (p.mend.action, p.mend.knob, p.mend.value) for p in found] == ([mend] if mend else [])


def test_a_trait_is_missed_only_once_the_model_was_looked_at() -> None:
    """Who takes an example and presses Run at once must not be refused for what the worker has not said yet."""
    known = zoo_info("smollm2-135m")
    assert known is not None
    assert "lean-shape" not in known.traits
    pipeline = parse_pipeline("lean-decode")
    assert pipeline_problems(pipeline, CATALOG, known) == []
    other = known.model_copy(update={"architecture": "GPT2LMHeadModel"})
    [problem] = pipeline_problems(pipeline, CATALOG, other)
    assert "needs a model with the trait 'lean-shape'" in problem.message


def test_candidates_come_from_the_schema() -> None:
    assert candidates({"enum": [256, 32, True, "x"]}) == [32, 256]
    assert candidates({"minimum": 10, "maximum": 64, "multipleOf": 16}) == [16, 32, 48, 64]
    assert candidates({"minimum": 1}) == []
    assert nearest_number(96, [64, 128]) == 64
    assert nearest_number(96, []) is None
