"""What a hosted studio refuses to strangers, and that it lets the usual things through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.compose import local_models_in_knobs, make_spec
from app.context import Context
from app.dispatch.local import LocalDispatch
from app.dispatch.runner import Settings
from app.hosted import NUMBERS, READ_ONLY, HostedLimits
from app.run_service import all_problems, refusals, sentence, start
from app.views.compare import _changing
from app.views.studio import opening
from app.views.studio_calls import editor_calls
from app.views.studio_events import StudioEvents
from studio_state import zoo
from studio_state.catalog import Catalog
from studio_state.claims import load_claims
from studio_state.errors import SpecError, StoreError
from studio_state.paths import DataDir
from studio_state.pipeline import Pipeline, Step, parse_pipeline

CATALOG, LIMITS = Catalog.load(), HostedLimits()


@pytest.fixture
def hosted(tmp_path: Path) -> Iterator[Context]:
    data = DataDir.at(tmp_path / "data").open()
    with LocalDispatch(data, settings=LIMITS.settings(Settings())) as dispatch:
        yield Context(CATALOG, dispatch, data, local_paths=False, hosted=LIMITS)


def said(
    model: str = "fashion-vit", workload: str = "classify", options: dict[str, Any] | None = None, **settings: Any
) -> list[str]:
    spec = make_spec(model, workload, [parse_pipeline("tome")], options, settings)
    return [p.message for p in LIMITS.problems(spec, CATALOG)]


def test_the_usual_is_let_through() -> None:
    for card in CATALOG.workloads:
        assert said(workload=card.id) == [], card.id
        assert said(workload=card.id, options=card.defaults()) == [], card.id
    for claim in load_claims().values():
        assert [p.message for e in claim.experiments for p in LIMITS.problems(e.spec(), CATALOG)] == [], claim.id


def test_visitors_of_a_shared_studio_bring_no_code_and_no_paths(tmp_path: Path) -> None:
    data = DataDir.at(tmp_path / "data").open()
    with LocalDispatch(data) as dispatch:
        shared = Context(CATALOG, dispatch, data, local_paths=False)
        own = Context(CATALOG, dispatch, data, local_paths=True)
        spec = make_spec("org/name", "speed", [parse_pipeline("speculative:draft_model=/etc")], {}, {"trust_remote_code": True})
        assert [p.knob for p in refusals(shared, spec)] == ["trust_remote_code", "draft_model"]
        assert refusals(own, spec) == []


@pytest.mark.parametrize(
    ("draft", "allowed"), [("smollm2-135m", True), ("org/name", True), ("/etc", False), ("./x", False), ("x.gguf", False)]
)
def test_a_model_that_a_knob_names_is_opened_by_name_too(draft: str, allowed: bool) -> None:
    lane = Pipeline(steps=(Step(policy="speculative", knobs={"draft_model": draft}),))
    spec = make_spec("smollm2-135m", "speed", [lane], {}, {})
    here, shared = LIMITS.problems(spec, CATALOG), local_models_in_knobs(spec.lanes, CATALOG)
    for found in (here, shared):
        assert [(p.lane, p.step, p.knob) for p in found] == ([] if allowed else [(1, 0, "draft_model")])


@pytest.mark.parametrize("model", [*(e.id for e in zoo.entries()), "org/name", "Org.X/na-me_2@v1.0", "org/name@refs/pr/3"])
def test_models_by_name(model: str) -> None:
    assert said(model) == []


@pytest.mark.parametrize(
    "model",
    ["/etc", "~/x", ".", "./x", "../x/y", "a/b/c", "C:\\x", "x.gguf", "org/x.gguf", "org/x.safetensors", "no-such", "org/name@../../x", "org/name\n", "o" * 4000, "org/" + "n" * 300],
)  # fmt: skip
def test_no_model_by_path(model: str) -> None:
    spec = make_spec("fashion-vit", "classify", [], {}, {"model": model})  # a caller can put anything into the settings
    (message,) = [p.message for p in LIMITS.problems(spec, CATALOG)]
    assert "cannot be opened here; choose a model of the list or a Hub id" in message
    assert len(message) < 250


def test_a_folder_that_looks_like_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "models cannot be opened by path here" in said("org/name")[0]


def test_no_files_of_the_host() -> None:
    for card in CATALOG.workloads:
        for name, prop in card.options.get("properties", {}).items():
            if name == "file" or prop.get("format") == "path":
                assert f"leave {name} empty" in said(workload=card.id, options={name: "/etc/passwd"})[0]
                assert [m for word in prop.get("examples", ()) for m in said(workload=card.id, options={name: word})] == []


def test_no_code_of_a_model() -> None:
    assert "code that a model brings along is not run here" in said("org/name", trust_remote_code=True)[0]


def test_sizes_are_bounded() -> None:
    assert said(options={"items": 301}) == [
        "items = 301 is too much here; at most 300: lower it, or run the studio on your own machine, where there is no such limit"
    ]
    assert [m.split(" = ")[0] for m in said(repeats=11, batch=9, threads=1024, max_new_tokens=257)] == [
        "repeats",
        "batch",
        "threads",
        "max_new_tokens",
    ]
    assert "9 lanes are too many here; at most 8" in said(lanes=[{}] + [{"steps": [{"policy": "tome"}]}] * 8)[0]
    assert (
        "characters long; at most 20,000 here: shorten its texts" in said(workload="prompts", options={"text": "x" * 20_000})[0]
    )
    assert said(options={"items": float("nan")}) != []


def test_every_option_that_can_grow_is_bounded() -> None:
    for card in CATALOG.workloads:
        for name, prop in card.options.get("properties", {}).items():
            if prop.get("type") in ("integer", "number"):
                assert name in NUMBERS or prop.get("maximum", 1e9) <= 256 or "enum" in prop, (
                    f"bound {name} of {card.id} in app/hosted.py"
                )


def test_the_page_and_the_api_refuse_alike(hosted: Context) -> None:
    spec = make_spec("/etc", "classify", [], {"source": "/etc"}, {"repeats": 1000})
    assert [p.knob for p in all_problems(hosted, spec)][:3] == ["model", "source", "repeats"]
    with pytest.raises(SpecError, match="cannot be opened here"):
        start(hosted, spec, "somebody")
    assert list(hosted.data.spools.iterdir()) == []


def test_a_look_at_a_model_runs_no_code_either(hosted: Context) -> None:
    events = StudioEvents(hosted)
    found = events.look_up("/etc", "classify", {}, {}, "cpu", [])
    assert "cannot be opened here" in str(found)
    assert hosted.dispatch.status()[0].hello is None  # no worker was started for it


def test_nobody_changes_what_others_see(hosted: Context) -> None:
    assert sentence(READ_ONLY) in str(StudioEvents(hosted).unload("cpu"))
    calls = editor_calls(hosted)
    lane = {"name": "Mine", "steps": [{"policy": "tome", "knobs": {}}]}
    assert calls["save_pipeline"](lane) == {"message": sentence(READ_ONLY)}
    assert calls["forget_pipeline"]("Mine") == {"message": sentence(READ_ONLY), "saved": []}
    with pytest.raises(StoreError, match="nothing that others see can be changed"):
        _changing(hosted, lambda _: {"message": "done"})({})
    hosted.hosted = None
    assert _changing(hosted, lambda _: {"message": "done"})({}) == {"message": "done"}
    assert "saved" in calls["save_pipeline"](lane)


def test_the_page_opens_with_a_model_that_is_there(hosted: Context) -> None:
    model, workload = opening(hosted)
    entry = zoo.get(model)
    assert zoo.is_cached(entry)
    assert entry.family in workload.families
    hosted.hosted = None
    assert opening(hosted)[0] == zoo.entries()[0].id


def test_the_queue_is_short_and_the_workers_get_no_token() -> None:
    settings = LIMITS.settings(Settings(grace_s=1.0))
    assert (settings.grace_s, settings.most_s, settings.waiting, settings.waiting_each) == (1.0, 600, 16, 2)
    assert LIMITS.environment() == {"PARETO_STUDIO_MAX_DOWNLOAD": "2000000000", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
