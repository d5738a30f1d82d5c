"""``pareto-studio export-model`` as a person runs it: the table, the exit status, and the folder as a model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from app.cli_export import show

Start = Callable[..., "subprocess.Popen[str]"]


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def test_from_the_command_to_a_run(pareto_studio: Start, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    code, said, err = ended(
        pareto_studio("export-model", "--model", tiny_llama, "--pipeline", "rtn:bits=4", "--out", out, "--threads", 1)
    )
    assert code == 0, err
    table = json.loads((out / "pareto.json").read_text())["bytes"]
    for count in (table["base"], table["theoretical"] + table["scales"] + table["padding"], table["in_memory"], table["on_disk"]):
        assert f"{count:,}" in said
    assert table["on_disk"] == (out / "model.safetensors").stat().st_size
    assert f"use it with --model {out}" in said
    words = ("run", "--model", out, "--workload", "prompts", "--set", "text=Hello", "--max-new-tokens", 4, "--threads", 1)
    code, _, err = ended(pareto_studio(*words, "--data-dir", tmp_path / "data", "--json", tmp_path / "run.json"))
    assert code == 0, err
    (baseline,) = json.loads((tmp_path / "run.json").read_text())["lanes"]
    assert baseline["metrics"]["weight_bytes"] == table["in_memory"]
    code, said, err = ended(
        pareto_studio("export-model", "--model", out, "--pipeline", "rtn+snapkv", "--out", tmp_path / "again")
    )
    assert code == 2
    assert "snapkv changes how a model runs, not its weights" in err
    assert not (tmp_path / "again").exists()


def test_counts_that_disagree_end_with_status_one(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    counts = {
        "base": 100,
        "theoretical": 20,
        "scales": 2,
        "padding": 0,
        "in_memory": 80,
        "computed": 0,
        "on_disk": 90,
        "header": 8,
    }
    recipe = {"pipeline": "rtn", "dtype": "float32", "bytes": counts, "complaint": "the byte counts disagree: so and so"}
    (tmp_path / "pareto.json").write_text(json.dumps(recipe))
    assert show(tmp_path, as_json=False) == 1
    assert "the byte counts disagree: so and so" in capsys.readouterr().out
    assert show(tmp_path, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["on_disk"] == 90
