"""What every policy promises on diffusion models, and every legal pair of policies on them.

A new file under ``workers/policies`` is covered at once; its knobs are its defaults, or those that act on a random model.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from studio_state.catalog import Catalog
from studio_state.metrics import METRICS
from studio_state.pipeline import Pipeline, Step
from studio_state.problems import pipeline_problems
from tests import tiny
from tests.methods.drawing import OWN, condition, draw, drawing_session, same_pictures
from tests.methods.driving import attached
from tests.sampling import chosen, sampled
from tests.tiny_diffusion import BUILDERS
from workers.families.base import RunTrace
from workers.mechanisms.weight_policy import weight_metrics
from workers.methods import Policy, catalogue, discover, effective

POLICIES = {n: cls for n, cls in discover().items() if "diffusion" in cls.card.families}
CATALOG: Catalog = catalogue()
MODELS = (OWN, *BUILDERS)
KNOBS: dict[str, dict[str, Any]] = {
    "first-block-cache": {"threshold": 10.0},  # a random model changes much from step to step
    **{name: {"bits": 8} for name in ("awq", "gptq", "hqq", "quarot")},  # no group divides these widths
    **{name: {"group_size": 8} for name in ("lut-gemm", "lut-tensor-core")},
    "mixed-bits": {"bits": 8, "low": 8},
}


@cache
def folder() -> Path:
    home = tiny.root() / "pipelines"
    home.mkdir(parents=True, exist_ok=True)
    return home


def problems_of(model: str, *names: str) -> list[str]:
    pipeline = Pipeline(steps=tuple(Step(policy=n, knobs=KNOBS.get(n, {})) for n in names))
    info = drawing_session(model, folder()).info
    return [p.message for p in pipeline_problems(pipeline, CATALOG, info, "generate-images")]


def policy_of(name: str) -> Policy:
    return POLICIES[name].model_validate(KNOBS.get(name, {}))


@cache
def baseline(model: str) -> RunTrace:
    return draw(drawing_session(model, folder()))


CASES = [(name, model) for name in POLICIES for model in MODELS]


@pytest.mark.parametrize(("name", "model"), sampled(CASES, 4, always=lambda case: case[1] == OWN))
def test_a_policy_moves_what_it_promises_or_is_refused(name: str, model: str) -> None:
    session, card = drawing_session(model, folder()), POLICIES[name].card
    refused = problems_of(model, name)
    missing = set(card.traits) - set(session.info.traits)
    unwanted = set(card.not_traits) & set(session.info.traits)
    assert bool(refused) == bool(missing | unwanted), refused
    if refused:
        return
    plain, before = baseline(model), condition(session)
    trace = draw(session, policy_of(name))
    assert condition(session) == before
    assert session.acted.get(name, 0) > 0
    assert set(trace.counts) <= set(METRICS)
    bare = weight_metrics(session)
    with attached(session, policy_of(name)):
        held = weight_metrics(session)
    for metric, way in card.effects.items():
        old, new = ({**counts, **weights}.get(metric, 0.0) for counts, weights in ((plain.counts, bare), (trace.counts, held)))
        assert {"down": new < old, "up": new > old, "same": new == old}[way], f"{metric}: {old} -> {new}"
    assert same_pictures(plain, trace) == (card.neutral == {})  # acts, and loses nothing
    assert same_pictures(plain, draw(session))  # nothing stays
    if card.neutral:
        assert same_pictures(plain, draw(session, POLICIES[name].model_validate(card.neutral)))


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", [OWN, "dit"])
def test_legal_pairs_draw(model: str, every: int) -> None:
    session, ran = drawing_session(model, folder()), []
    before = condition(session)
    fitting = [n for n in POLICIES if not problems_of(model, n)]
    for pair in combinations(fitting, 2):
        if not chosen(repr(pair), every) or problems_of(model, *pair):
            continue
        steps = tuple(Step(policy=n, knobs=KNOBS.get(n, {})) for n in pair)
        trace = draw(session, *effective(Pipeline(steps=steps)), seeds=(5,))
        assert len(trace.drawn) == 1
        assert condition(session) == before
        ran.append(pair)
    assert len(ran) >= 40 / every, ran


def test_caches_do_not_stand_with_rows_that_come_and_go() -> None:
    assert any("the denoiser gets the same rows" in m for m in problems_of(OWN, "deepcache", "cfg-skip"))
    assert any("denoise.reuse" in m or "needs a model" in m for m in problems_of("dit", "first-block-cache", "deepcache"))
