"""What every policy promises, checked on a 2-layer model. A new file under ``workers/policies`` is covered at once.

Cards and knobs of all policies; runs of those for language models (``test_vision_contract`` runs those for models that see).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from studio_state.catalog import FAMILIES, Card, Catalog
from studio_state.experiment import ModelInfo
from studio_state.metrics import METRICS
from studio_state.pipeline import Pipeline, Step
from studio_state.problems import pipeline_problems
from tests.methods.driving import attached, folder_for, forced, generate, make_session, prompt, repetitive_prompt, tokens
from workers.mechanisms.weight_policy import weight_metrics
from workers.methods import Policy, catalogue, discover
from workers.session import Session

POLICIES = discover()
CATALOG: Catalog = catalogue()
PROMPT = repetitive_prompt(96)
FOLLOWING = prompt(12, seed=9)
NEW = 16
every_policy = pytest.mark.parametrize("name", POLICIES)
every_llm_policy = pytest.mark.parametrize("name", [n for n, cls in POLICIES.items() if "llm" in cls.card.families])


@dataclass
class Outcome:
    """What a lane did: tokens, counts and bytes, and the scores of a given continuation."""

    tokens: list[list[int]]
    metrics: dict[str, float]
    logits: Tensor


def run(session: Session, *policies: Policy) -> Outcome:
    """One lane, as the engine runs it."""
    with attached(session, *policies):
        trace = generate(session, [PROMPT], new=NEW)
        logits = forced(session, PROMPT, FOLLOWING)
        return Outcome(tokens(trace), {**trace.counts, **weight_metrics(session)}, logits)


def card_of(name: str) -> Card:
    return CATALOG.by_id[name]


def session_for(name: str, **spec: Any) -> Session:
    """A session on a model that the policy can act on."""
    return make_session(folder_for(card_of(name)), **spec)


@cache
def baseline_on(folder: Path) -> Outcome:
    return run(make_session(folder))


@pytest.fixture
def baseline(name: str) -> Outcome:
    """The empty lane on the model that the policy of this test acts on."""
    return baseline_on(folder_for(card_of(name)))


def bounds(prop: dict[str, Any]) -> Iterator[Any]:
    """Values just outside what a knob's schema allows; nothing if it is not bounded."""
    if "minimum" in prop and "maximum" in prop:
        yield from (prop["minimum"] - 1, prop["maximum"] + 1)
    elif "enum" in prop or "const" in prop or prop.get("type") == "boolean":
        yield "no such value"
    elif prop.get("type") == "string" and "maxLength" in prop:
        yield "x" * (prop["maxLength"] + 1)
    elif "anyOf" in prop:
        inner = [list(bounds(p)) for p in prop["anyOf"] if p.get("type") != "null"]
        if all(inner):
            yield from inner[0]


def problems_of(name: str, knobs: dict[str, Any], model: ModelInfo | None = None, **more: Any) -> list[str]:
    pipeline = Pipeline(steps=(Step(policy=name, knobs=knobs),))
    return [p.message for p in pipeline_problems(pipeline, CATALOG, model, **more)]


@every_policy
def test_card_is_complete(name: str) -> None:
    card = card_of(name)
    assert card.kind == "policy"
    assert card.stage is not None
    assert card.title
    assert card.summary.endswith(".")
    assert card.paper == "" or re.match(r"arXiv:\d{4}\.\d{5}$|[A-Z]\w+ .*\d{4}", card.paper), (
        "an arXiv id or author, year and title; empty = folklore"
    )
    assert len(card.doc.split("\n\n")) > 1, "the docstring goes on with source and deviations, or where folklore has it from"
    assert card.resources, "a policy acts on some resource"
    assert set(card.families) <= set(FAMILIES)
    assert card.effects, "a policy promises at least one count or number of bytes"
    for metric in (*card.effects, *card.hopes):
        assert metric in METRICS
    assert all(METRICS[m].group in ("count", "memory") for m in card.effects)
    assert (card.neutral is None) == bool(card.not_neutral_because), "neutral knobs, or the reason why there are none"
    if card.neutral is not None:
        POLICIES[name].model_validate(card.neutral)


@every_policy
def test_knobs_are_documented_and_bounded(name: str) -> None:
    for knob, prop in card_of(name).knobs.get("properties", {}).items():
        assert prop.get("description"), f"{knob} has no help"
        assert "default" in prop
        assert list(bounds(prop)), f"{knob} is not bounded"


@every_policy
def test_knobs_refuse_what_is_out_of_range_or_unknown(name: str) -> None:
    cls = POLICIES[name]
    wrong = [(k, v) for k, prop in card_of(name).knobs.get("properties", {}).items() for v in bounds(prop)]
    for knob, value in [*wrong, ("no_such_knob", 1)]:
        with pytest.raises(ValidationError):
            cls.model_validate({knob: value})
        assert len(problems_of(name, {knob: value})) == 1
    assert cls.model_config["frozen"]


@every_policy
def test_other_families_are_refused(name: str) -> None:
    card = card_of(name)
    fitting = make_session().info.model_copy(update={"traits": card.traits, "layers": 4})
    assert card.families
    for family in FAMILIES:
        found = problems_of(name, {}, fitting.model_copy(update={"family": family}))
        if family in card.families:
            assert found == []
        else:
            assert len(found) == 1
            assert family in found[0]


@every_llm_policy
def test_neutral_knobs_change_nothing(name: str, baseline: Outcome) -> None:
    card, session = card_of(name), session_for(name)
    if card.neutral is None:
        assert card.not_neutral_because
        return
    got = run(session, POLICIES[name].model_validate(card.neutral))
    assert got.tokens == baseline.tokens
    torch.testing.assert_close(got.logits, baseline.logits, rtol=1e-5, atol=2e-5)


@every_llm_policy
def test_effects_hold_at_default_knobs(name: str, baseline: Outcome) -> None:
    session = session_for(name)
    got = run(session, POLICIES[name]())
    assert session.acted.get(name, 0) > 0, "nothing was done"
    for metric, direction in card_of(name).effects.items():
        before, after = baseline.metrics.get(metric, 0.0), got.metrics[metric]
        assert {"up": after > before, "down": after < before, "same": after == before}[direction], (
            f"{metric}: {before} -> {after}"
        )
    assert set(got.metrics) <= set(METRICS)


def condition(session: Session) -> dict[str, Any]:
    """Everything of a session and its model that a policy may touch and must put back."""
    kept = {f.name: getattr(session, f.name) for f in fields(session) if f.name not in ("built", "acted", "counts")}
    kept = {k: list(v) if isinstance(v, list) else v for k, v in kept.items()}
    modules = {n: id(m) for n, m in session.model.named_modules()}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in session.model.named_modules()}
    own = {n: sorted(vars(m)) for n, m in session.model.named_modules()}
    weights = {n: (p.data_ptr(), p._version) for n, p in (*session.model.named_parameters(), *session.model.named_buffers())}
    return {
        **kept,
        "modules": modules,
        "hooks": hooks,
        "own": own,
        "weights": weights,
        "attention": session.model.config._attn_implementation,
    }


def interrupted(session: Session, policy: Policy) -> None:
    with attached(session, policy):
        generate(session, [PROMPT], new=2)
        raise KeyboardInterrupt


@every_llm_policy
def test_everything_is_undone(name: str, baseline: Outcome) -> None:
    session, policy = session_for(name), POLICIES[name]()
    before = condition(session)
    run(session, policy)
    assert condition(session) == before
    with pytest.raises(KeyboardInterrupt):
        interrupted(session, policy)
    assert condition(session) == before
    again = run(session)
    assert again.tokens == baseline.tokens
    assert torch.equal(again.logits, baseline.logits)
    assert again.metrics == baseline.metrics


@every_llm_policy
def test_chunked_prefill_runs_or_is_refused(name: str) -> None:
    needs_whole = any(u.resource == "prefill.whole" and u.mode == "needs" for u in card_of(name).uses({}))
    found = problems_of(name, {}, chunked=True)
    assert len(found) == needs_whole
    if not needs_whole:
        session = session_for(name, chunk_size=7)
        with attached(session, POLICIES[name]()):
            trace = generate(session, [PROMPT], new=NEW)
        assert len(tokens(trace)[0]) == NEW
        assert session.acted[name] > 0


@every_llm_policy
def test_batches_run_or_are_refused(name: str) -> None:
    limit = card_of(name).max_batch
    found = problems_of(name, {}, batch=2)
    assert len(found) == (limit == 1)
    if not found:
        session = session_for(name, batch=2)
        with attached(session, POLICIES[name]()):
            trace = generate(session, [PROMPT, PROMPT[:70]], new=4)
        assert [len(row) for row in tokens(trace)] == [4, 4]
