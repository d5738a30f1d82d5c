"""An exported script runs where the studio is not installed, and gives the engine's tokens."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.cli_history import export_experiment
from app.script_export import bundle, export_script, policy_class
from studio_state.catalog import Catalog
from studio_state.errors import SpecError, StoreError
from studio_state.events import Event, ModelLoaded, Output, Submitted
from studio_state.experiment import ExperimentSpec
from studio_state.paths import DataDir
from studio_state.runcard import read_card
from studio_state.spool import SpoolWriter
from tests.sampling import first
from workers.engine import run
from workers.host import ModelHost
from workers.methods import discover
from workers.standalone import main

ROOT = Path(__file__).parents[2]
TEXT = "However little known the feelings or views of such a man may be, this truth is fixed. " * 6
# every kind of seam: cache eviction and storage, token selection, replaced weights, own step, own decode loop
LANES = [
    [],
    [{"policy": "snapkv", "knobs": {"keep": 0.4, "window": 8}}, {"policy": "kivi", "knobs": {"bits": 4, "residual": 8}}],
    [
        {"policy": "promptdistill", "knobs": {"keep": 0.3}},
        {"policy": "prompt-lookup"},
        {"policy": "magnitude", "knobs": {"sparsity": 0.3}},
    ],
    [{"policy": "rtn", "knobs": {"bits": 8}}, {"policy": "lean-decode"}],
]


def record(model: Path, **more: object) -> list[Event]:
    data = {
        "model": str(model), "workload": {"id": "prompts", "options": {"text": TEXT}}, "lanes": [{"steps": s} for s in LANES],
        "threads": 1, "max_new_tokens": 24, **more,
    }  # fmt: skip
    spec = ExperimentSpec.model_validate(data)
    events = [Submitted(spec=spec), *run(spec, ModelHost())]
    return [e.model_copy(update={"experiment": "20260131-000000-abcdef", "seq": i}) for i, e in enumerate(events)]


@pytest.fixture(scope="module")
def recorded(tiny_llama: Path) -> list[Event]:
    return record(tiny_llama)


def alone(script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script in another folder, with an interpreter that finds every package but this project."""
    starter = script.with_name("starter.py")
    starter.write_text(
        "import runpy, sys\n"
        f"sys.path[:] = [p for p in sys.path if p not in ('', {str(ROOT)!r})]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "from importlib.util import find_spec\n"
        "found = [n for n in ('app', 'workers', 'studio_state', 'assets') if find_spec(n)]\n"
        "assert not found, found\n"
        f"sys.argv = [{str(script)!r}, *sys.argv[1:]]\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PARETO_STUDIO_DATA")} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [sys.executable, "-P", str(starter), *words]
    return subprocess.run(command, cwd=script.parent, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("lane", first(1, *range(1, len(LANES))))
def test_the_script_gives_the_engines_tokens_without_the_studio(recorded: list[Event], lane: int, tmp_path: Path) -> None:
    tokens = next(e.data["token_ids"] for e in recorded if isinstance(e, Output) and e.lane == lane)
    assert len(tokens) > 3
    script = tmp_path / "pipeline.py"
    script.write_text(export_script(recorded, lane, Catalog.load()), encoding="utf-8")
    done = alone(script)
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"tokens: {tokens}" in done.stdout
    assert "1 of 1 outputs have the recorded tokens" in done.stdout
    assert str(ROOT) not in script.read_text(encoding="utf-8")


def settings_of(script: str) -> dict[str, Any]:
    """The settings at the end of a script."""
    found = [n.value for n in ast.parse(script).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "SETTINGS"]
    return ast.literal_eval(found[0])


def test_the_script_says_when_tokens_differ_and_takes_a_prompt(
    recorded: list[Event], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(export_script(recorded, 1, Catalog.load()))
    assert [(module, name) for module, name, _ in settings["policies"]] == [
        ("workers.policies.kv.snapkv", "SnapKV"), ("workers.policies.kv.kivi", "Kivi"),
    ]  # fmt: skip
    settings["recorded"][0]["token_ids"][3] += 1
    assert main(settings, []) == 1
    assert "0 of 1 outputs have the recorded tokens" in capsys.readouterr().out
    assert main(settings, ["--prompt", "A river"]) == 0
    assert capsys.readouterr().out.strip()
    settings["recorded"][0]["pieces"][0] = "?"
    assert main(settings, []) == 1
    assert "the tokenizer cuts the prompt in another way" in capsys.readouterr().err
    assert main(settings, ["--model", str(tmp_path / "nothing")]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("cannot load")
    assert "\n" not in said


def test_the_head_says_where_the_model_is_from(recorded: list[Event]) -> None:
    zoo = [
        e.model_copy(update={"spec": e.spec.model_copy(update={"model": "smollm2-135m"})}) if isinstance(e, Submitted) else e
        for e in recorded
    ]
    script = export_script(zoo, 1, Catalog.load(), "mine.py")
    assert settings_of(script)["model"] == "smollm2-135m"
    assert "# Run:   python mine.py" in script
    assert "SmolLM2-135M-Instruct.Q4_1.gguf;\n#        give --model that file" in script
    assert "torch==" in script.split("# Needs: ")[1].splitlines()[0]


def test_every_policy_is_found_in_the_sources() -> None:
    for name, cls in discover().items():
        assert policy_class(name) == (cls.__module__, cls.__name__)
    with pytest.raises(SpecError, match="'nothing' cannot be found"):
        policy_class("nothing")


def test_a_bundle_holds_what_is_imported_and_no_more() -> None:
    names = {m.name for m in bundle(["workers.policies.kv.snapkv"])}
    assert {
        "workers.policies.kv.snapkv",
        "workers.policies",
        "workers",
        "workers.mechanisms.eviction",
        "studio_state.catalog",
    } <= names
    assert not [n for n in names if n.startswith(("app", "workers.engine", "workers.policies.kv.h2o", "workers.meters"))]


def test_what_has_no_tokens_is_refused(recorded: list[Event]) -> None:
    with pytest.raises(SpecError, match="there is no lane 9"):
        export_script(recorded, 9, Catalog.load())
    scored = [e.model_copy(update={"kind": "score"}) if isinstance(e, Output) else e for e in recorded]
    with pytest.raises(SpecError, match="generates no tokens"):
        export_script(scored, 0, Catalog.load())


def test_packed_weights_are_refused(recorded: list[Event]) -> None:
    packed = [
        e.model_copy(update={"info": e.info.model_copy(update={"packed": "rtn of llama"})}) if isinstance(e, ModelLoaded) else e
        for e in recorded
    ]
    with pytest.raises(SpecError, match=r"holds packed weights \(rtn of llama\), which a script without the studio cannot read"):
        export_script(packed, 1, Catalog.load())


def test_export_command_writes_card_and_script(recorded: list[Event], tmp_path: Path) -> None:
    data = DataDir.at(tmp_path / "data").open()
    with SpoolWriter(data.spool(recorded[0].experiment)) as spool:
        spool.append_all(recorded)
    card, script = tmp_path / "card.json", tmp_path / "pipeline.py"
    export_experiment(data, recorded[0].experiment, card, script, lane=1)
    assert read_card(card).experiment.id == recorded[0].experiment
    assert script.read_text() == export_script(recorded, 1, Catalog.load(), "pipeline.py")
    with pytest.raises(SpecError, match="nothing to write"):
        export_experiment(data, recorded[0].experiment, None, None, 1)
    with pytest.raises(StoreError, match="there is no experiment 'none'"):
        export_experiment(data, "none", None, script, 1)
