"""What stands between the page and the dispatcher: specs from the page, saved pipelines, estimates, links, host's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.compose import is_local, make_spec, path_problems, read_lanes, settings_schema
from app.estimate import estimate_seconds, estimate_text
from app.race import Race
from app.saved import MAX_SAVED, SavedPipelines
from studio_state.catalog import Catalog
from studio_state.errors import SpecError
from studio_state.pipeline import Pipeline, parse_pipeline, read_pipeline
from studio_state.problems import pipeline_problems

CATALOG = Catalog.load()


def test_lanes_are_read_from_data_and_from_text() -> None:
    lanes = read_lanes(["snapkv:keep=0.25", {"name": "w4", "steps": [{"policy": "rtn", "knobs": {"bits": 4}}]}, {"steps": []}])
    assert [p.text() for p in lanes] == ["snapkv:keep=0.25", "rtn:bits=4"]
    assert len(read_lanes([{"steps": []}, "rtn"], keep_empty=True)) == 2
    with pytest.raises(SpecError, match="5 lanes were given; at most 4 run beside the baseline"):
        read_lanes(["rtn"] * 5)
    with pytest.raises(SpecError, match="lanes must be a list of pipelines, not dict"):
        read_lanes({})


def test_the_baseline_is_always_lane_0() -> None:
    spec = make_spec("m", "prompts", [parse_pipeline("rtn")], {"items": 2}, {"seed": 7})
    assert ([p.text() for p in spec.lanes], spec.seed, spec.workload.options) == (["baseline", "rtn"], 7, {"items": 2})
    assert len(make_spec("m", "prompts", []).lanes) == 1


def test_all_bad_settings_are_named_at_once() -> None:
    with pytest.raises(SpecError) as refused:
        make_spec("m", "prompts", [], {}, {"repeats": 0, "batch": "many", "nonsense": 1})
    said = [p.message for p in refused.value.problems]
    assert [s.split(" = ")[0] for s in said] == ["repeats", "batch", "nonsense"] or len(said) == 3
    with pytest.raises(SpecError, match="choose a model"):
        make_spec("  ", "prompts", [])


def test_every_setting_of_the_page_is_described() -> None:
    for name, prop in settings_schema()["properties"].items():
        assert prop.get("description"), name
        assert "default" in prop, name


def test_what_counts_as_a_file_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    local = ["/etc", "~/models/x", "./x", "../x", "C:\\models", "model.gguf", "org/name", str(tmp_path)]
    assert [is_local(m) for m in local] == [True] * len(local)
    assert [is_local(m) for m in ("smollm2-135m", "org/other", "org/other@main")] == [False] * 3
    found = path_problems("/etc", {"file": "/etc/passwd", "items": 3}, "perplexity", CATALOG)
    assert [p.knob for p in found] == ["model", "file"]
    assert path_problems("smollm2-135m", {"file": ""}, "perplexity", CATALOG) == []


def test_saved_pipelines_are_files_that_the_command_line_reads(tmp_path: Path) -> None:
    shelf = SavedPipelines(tmp_path / "pipelines")
    assert shelf.all() == []
    for name in ("Mine", "mine", "../../evil", "ünï ✓", "x" * 150):
        shelf.save({"name": name, "steps": [{"policy": "rtn", "knobs": {"bits": 4}}]})
    assert {p.name for p in shelf.all()} == {"Mine", "mine", "../../evil", "ünï ✓", "x" * 80}
    files = list((tmp_path / "pipelines").iterdir())
    assert len(files) == 5
    assert {f.parent for f in tmp_path.rglob("*.json")} == {tmp_path / "pipelines"}
    assert all(read_pipeline(f).text() == "rtn:bits=4" for f in files)
    shelf.save({"name": "Mine", "steps": [{"policy": "kivi"}]})
    assert {p.name: p.text() for p in shelf.all()}["Mine"] == "kivi"
    shelf.forget("Mine")
    shelf.forget("never saved")
    assert "Mine" not in {p.name for p in shelf.all()}
    (tmp_path / "pipelines" / "torn.json").write_text('{"name": "to')
    assert len(shelf.all()) == 4


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    shelf = SavedPipelines(tmp_path)
    with pytest.raises(SpecError, match="give the lane a name"):
        shelf.save({"name": "  ", "steps": [{"policy": "rtn"}]})
    with pytest.raises(SpecError, match="an empty lane is the baseline"):
        shelf.save({"name": "x", "steps": []})
    for i in range(MAX_SAVED):
        (tmp_path / f"{i}.json").write_text(json.dumps({"name": str(i), "steps": [{"policy": "rtn"}]}))
    with pytest.raises(SpecError, match="200 pipelines are saved already"):
        shelf.save({"name": "one more", "steps": [{"policy": "rtn"}]})


def test_the_estimate_follows_lanes_items_and_repeats() -> None:
    before = make_spec("m", "needle", [parse_pipeline("rtn")], {"items": 4})
    race = Race("x", status="finished", spec=before, started_at=100.0, first_item_at=110.0, ended_at=150.0)
    more = make_spec("m", "needle", [parse_pipeline("rtn")] * 3, {"items": 8}, {"repeats": 2})
    assert estimate_seconds(more, [race], CATALOG) == 10 + 40 * (4 * 8 * 2) / (2 * 4)
    assert estimate_seconds(make_spec("other", "needle", []), [race], CATALOG) is None
    assert estimate_text(None).startswith("No run of this model")


def test_every_example_fits_the_catalogue(examples: list[Pipeline]) -> None:
    assert len(examples) >= 5
    for pipeline in examples:
        assert pipeline.name
        assert pipeline_problems(pipeline, CATALOG) == [], pipeline.name
        assert pipeline.ordered(CATALOG).steps == pipeline.steps, pipeline.name


@pytest.fixture
def examples() -> list[Pipeline]:
    from studio_state.catalog import asset

    read = [read_pipeline(path) for path in sorted(asset("pipelines").glob("*.json"))]
    return read + [Pipeline.model_validate(lane) for pipeline in read for lane in (pipeline.model_extra or {}).get("beside", ())]
