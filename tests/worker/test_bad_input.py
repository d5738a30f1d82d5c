"""What a careless or unlucky person may give: one clear sentence each, the record stays whole, the worker lives on."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from app.__main__ import explain
from app.cli import cli
from app.dispatch.local import LocalDispatch
from app.dispatch.runner import Settings
from studio_state.catalog import Catalog
from studio_state.errors import StudioError
from studio_state.events import Event, Failed, Finished, LaneFinished, Metric, Output, decode
from studio_state.experiment import ExperimentSpec, ModelInfo
from studio_state.migrations import TABLES
from studio_state.paths import DataDir
from studio_state.pipeline import parse_pipeline
from studio_state.problems import problems
from studio_state.spool import read_spool
from studio_state.store import Store
from tests.tiny import llama_folder
from tests.tiny_diffusion import build_pipeline
from workers.engine import run
from workers.models.fit import LIMIT_VARIABLE
from workers.serve import Server

PATIENCE_S = 120
TEXT = "The secret number for Lisbon is 4071; remember it well, and tell it to nobody but the man at the river."


def is_one_sentence(text: str) -> bool:
    """True if a person would take it for one: a line, without a traceback, a class name or an address."""
    return bool(text) and "\n" not in text and not any(w in text for w in ("Traceback", "Error:", 'File "', " object at 0x"))


# -- refused by the command line itself: no worker starts, nothing is recorded


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    """Exit status and the lines on stderr of a command, run in this process as ``pareto-studio`` runs it."""
    result = CliRunner().invoke(cli, words)
    if result.exception is None or isinstance(result.exception, SystemExit):
        return result.exit_code, result.stderr.splitlines()
    code = explain(result.exception)  # type: ignore[arg-type]
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--lane", "snapkw"], ["there is no policy 'snapkw'; did you mean 'snapkv'?"]),
        (["--lane", "snapkv:kep=0.5"], ["snapkv has no knob 'kep'; did you mean 'keep'? allowed: keep, when"]),
        (["--lane", "snapkv:keep=2"], ["keep = 2 is not allowed; allowed: a number from 0.01 to 1.0"]),
        (["--lane", "snapkv:keep=NaN"], ["keep = nan is not allowed; allowed: a number from 0.01 to 1.0"]),
        (["--lane", "snapkv:window=Infinity"], ["window = inf is not allowed; allowed: a whole number from 1 to"]),
        (["--lane", "snapkv:window=" + "1" * 5000], ["window = '111"]),
        (["--lane", "snapkv:keep=" + "[" * 5000], ["is not allowed"]),
        (["--lane", "snapkv+h2o"], ["both decide", "both decide"]),
        (["--lane", "snapkv+snapkv"], ["SnapKV stands in the pipeline twice; keep one"]),
        (["--lane", "prompt-lookup", "--batch", "2"], ["at most 1 item at a time, but the batch is 2; set batch = 1"]),
        (["--lane", "@nowhere.json"], ["cannot read the pipeline file nowhere.json"]),
        (["--lane", "h2o", "--lane", "knorm", "--isolate", "--reference", "1"], ["isolated lanes race the baseline only"]),
        (["--lane", "h2o:x=1", "--lane", "?", "--batch", "0"], ["cannot read '?'"]),
        (["--set", "items=0"], ["items = 0 is not allowed"]),
        (["--set", "itmes=3"], ["workload prompts has no option 'itmes'; did you mean 'items'?"]),
        (["--set", "text=\udcff\udcfe"], ["is binary data, not valid Unicode"]),
        (["--set", "items"], ["cannot read --set 'items'"]),
        (["--sweep", "h2o.keep=0.1,0.2"], ["no lane contains 'h2o'"]),
        (["--threads", "0"], ["--threads 0 is not allowed"]),
        (["--dtype", "int3"], ["--dtype 'int3' is not allowed"]),
        (["--seed", "-1"], ["--seed -1 is not allowed"]),
        (["--temperature", "nan"], ["--temperature nan is not allowed"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens 0 is not allowed"]),
        (["--reference", "3"], ["reference is lane 3, but there are 1 lanes"]),
        (["--model", ""], ["--model '' is not allowed"]),
        (["--workload", "nedle"], ["there is no workload 'nedle'; did you mean 'needle'?"]),
    ],
)  # fmt: skip
def test_refused_before_a_worker_starts(
    words: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["run", "--model", "m", "--workload", "prompts", "--data-dir", str(tmp_path / "data")]
    code, lines = told(capsys, *base, *words)
    assert code == 2
    assert all(any(part in line for line in lines) for part in parts), lines
    assert all(is_one_sentence(line) and len(line) < 500 for line in lines), lines
    assert not (tmp_path / "data").exists()


def test_every_problem_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--lane", "snapkw", "--lane", "rtn:bits=9", "--lane", "snapkv+h2o", "--set", "items=0"]
    code, lines = told(capsys, "run", "--model", "m", "--workload", "needle", *words)
    assert code == 2
    assert {line[:7] for line in lines if line.startswith("lane")} == {"lane 1:", "lane 2:", "lane 3:"}


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("list.json", "[1, 2]", "is not a pipeline"),
        ("text.yaml", "just words", "holds str, not a pipeline"),
        ("broken.json", '{"steps": [', "neither JSON nor YAML"),
        ("code.yaml", "!!python/object/apply:os.system ['touch ran']", "neither JSON nor YAML"),
        ("binary.json", b"\xff\xfe\x00", "cannot read the pipeline file"),
        ("step.json", '{"steps": [{"knobs": {}}]}', "Field required"),
    ],
)
def test_files_that_are_no_pipeline(
    name: str,
    content: str | bytes,
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, lines = told(capsys, "run", "--model", "m", "--workload", "prompts", "--lane", f"@{name}")
    assert (code, len(lines)) == (2, 1)
    assert part in lines[0]
    assert is_one_sentence(lines[0])
    assert not Path("ran").exists()


def test_a_policy_for_another_family_is_told_with_the_family() -> None:
    spec = ExperimentSpec(model="m", workload={"id": "prompts"}, lanes=(parse_pipeline("snapkv"),))  # type: ignore[arg-type]
    found = problems(spec, Catalog.load(), ModelInfo(name="m", family="vit"))
    assert any("SnapKV works on llm, vlm models; m is of family vit" in p.message for p in found)


# -- refused or failed by the worker: one real worker sees all of it and lives on


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Broken copies of the tiny Llama, and names that are no model."""
    home, good = tmp_path_factory.mktemp("models"), llama_folder()
    for name in ("no-config", "truncated", "pickle", "nan"):
        shutil.copytree(good, home / name)
    (home / "no-config" / "config.json").unlink()
    weights = home / "truncated" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    (home / "pickle" / "model.safetensors").unlink()
    torch.save(load_file(good / "model.safetensors"), home / "pickle" / "pytorch_model.bin")
    tensors = load_file(good / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(float("nan"))
    save_file(tensors, home / "nan" / "model.safetensors", {"format": "pt"})
    shutil.copytree(build_pipeline("dit", tmp_path_factory.mktemp("pipelines")), home / "diffusion")
    folders = {p.name: str(p) for p in home.iterdir()}
    return {
        **folders,
        "good": str(good),
        "unknown": "smolm2-135m",
        "offline": "nobody/has-this",
        "nowhere": str(home / "nowhere"),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("files")
    (home / "columns.csv").write_text("question,answer\nWhere?,Lisbon\n")
    (home / "empty.jsonl").write_text('{"prompt": "  "}\n')
    (home / "binary.txt").write_bytes(bytes(range(256)) * 8)
    (home / "surrogate.jsonl").write_text('{"prompt": "\\ud800"}\n')
    (home / "large.txt").write_text("river " * 175_000)
    assert (home / "large.txt").stat().st_size > 1_000_000
    return {p.name: str(p) for p in home.iterdir()}


class Rig:
    """A dispatcher with one real worker, its record, and how often a worker was started."""

    def __init__(self, folder: Path) -> None:
        self.data = DataDir.at(folder / "data").open()
        self.starts = folder / "starts"
        self.store = Store(self.data)
        self.dispatch = LocalDispatch(self.data, store=self.store, settings=Settings(command=self.command))

    def command(self, device: str) -> list[str]:
        worker = f"exec '{sys.executable}' -P -m workers serve --device {device}"
        return ["sh", "-c", f"echo $$ >> '{self.starts}'; {worker}"]

    def race(self, model: str, *lanes: str, **more: Any) -> list[Event]:
        """Events of a short run of the prompts workload."""
        options = more.pop("options", {"text": TEXT})
        spec = ExperimentSpec(
            model=model,
            workload={"id": more.pop("workload", "prompts"), "options": options},  # type: ignore[arg-type]
            lanes=tuple(map(parse_pipeline, lanes)),
            **{"threads": 1, "max_new_tokens": 4, "eos": "ignore", **more},
        )
        events = list(self.dispatch.follow(self.dispatch.submit(spec), timeout=PATIENCE_S))
        assert events[-1].event in ("finished", "failed"), events[-3:]  # type: ignore[attr-defined]
        return events

    def close(self) -> None:
        self.dispatch.close()
        self.store.close()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        opened = Rig(tmp_path_factory.mktemp("rig"))
        yield opened
        opened.close()


def failure(events: list[Event]) -> str:
    assert isinstance(events[-1], Failed), events[-1]
    assert is_one_sentence(events[-1].message), events[-1].message
    return events[-1].message


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("unknown", ["there is no model 'smolm2-135m'", "did you mean 'smollm2-135m'?"]),
        ("nowhere", ["there is no file or folder"]),
        ("offline", ["nobody/has-this is not on this machine and HF_HUB_OFFLINE is set"]),
        ("no-config", ["has no config.json"]),
        ("truncated", ["is truncated", "download it again"]),
        ("pickle", ["pytorch_model.bin", "safetensors"]),
        ("diffusion", ["H2O works on llm, vlm models", "is of family diffusion"]),
    ],
)
def test_models_that_cannot_be_loaded(model: str, parts: list[str], rig: Rig, models: dict[str, str]) -> None:
    message = failure(rig.race(models[model], "h2o"))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"text": ""}, "the prompt is empty"),
        ({"text": "\x00\x01\x7f"}, "is binary, not text"),
        ({"text": "x", "file": "large.txt"}, "both text and file are given"),
        ({"file": "columns.csv"}, "has no column 'prompt'; columns found: question, answer"),
        ({"file": "columns.csv", "prompt_column": "question", "answer_column": "right"}, "has no column 'right'"),
        ({"file": "empty.jsonl"}, "line 1 of"),
        ({"file": "binary.txt"}, "binary"),
        ({"file": "surrogate.jsonl"}, "is binary, not text"),
        ({"file": "large.txt"}, "the model's context is 2,048"),
        ({"file": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_prompts_that_cannot_be_run(
    options: dict[str, str], part: str, rig: Rig, files: dict[str, str], models: dict[str, str]
) -> None:
    given = {**options, "file": files.get(options["file"], options["file"])} if "file" in options else options
    assert part in failure(rig.race(models["good"], "h2o", options=given))


def test_more_new_tokens_than_the_context_holds(rig: Rig, models: dict[str, str]) -> None:
    message = failure(rig.race(models["good"], "h2o", max_new_tokens=5000))
    assert "exceed the context of 2048 tokens" in message
    assert "fewer new tokens" in message


def test_a_prompt_shorter_than_the_window_finishes_with_a_flag(rig: Rig, models: dict[str, str]) -> None:
    events = rig.race(models["good"], "snapkv:keep=0.5,window=512", options={"text": "Yes"}, chat_template=False)
    assert isinstance(events[-1], Finished)
    [lane] = [e for e in events if isinstance(e, LaneFinished) and e.lane == 1]
    assert lane.status == "finished"
    assert any(flag.startswith("no effect: ") and is_one_sentence(flag) for flag in lane.flags), lane


@pytest.mark.parametrize(
    ("workload", "options", "sampling"),
    [
        ("prompts", {"text": TEXT}, {}),
        ("prompts", {"text": TEXT}, {"temperature": 1.0}),
        ("perplexity", {"items": 1, "context": 64, "score": 16}, {}),
    ],
)
def test_a_model_that_computes_nan_fails_and_agrees_with_nothing(
    workload: str, options: dict[str, Any], sampling: dict[str, float], rig: Rig, models: dict[str, str]
) -> None:
    events = rig.race(models["nan"], "knorm:keep=0.5", workload=workload, options=options, sampling=sampling)
    ended = [e for e in events if isinstance(e, LaneFinished)]
    assert [(e.lane, e.status) for e in ended] == [(0, "failed"), (1, "failed")]
    assert all("is not a number (NaN)" in e.message and is_one_sentence(e.message) for e in ended)
    assert not [e for e in events if isinstance(e, Output)], "nonsense was shown as an answer"
    assert not {"kl_to_baseline", "top1_agreement", "perplexity"} & {e.name for e in events if isinstance(e, Metric)}


def test_half_precision_runs_and_a_device_that_is_not_served_is_named(rig: Rig, models: dict[str, str]) -> None:
    events = rig.race(models["good"], "knorm:keep=0.5", dtype="bfloat16")
    assert [e.status for e in events if isinstance(e, LaneFinished)] == ["finished"] * 2
    weights = {e.value for e in events if isinstance(e, Metric) and e.name == "weight_bytes"}
    assert len(weights) == 1
    with pytest.raises(StudioError, match=r"device 'cuda:7' is not served here; allowed: cpu"):
        rig.race(models["good"], device="cuda:7")


def test_the_stream_holds_no_nan_the_worker_lived_and_the_record_is_whole(rig: Rig) -> None:
    """Runs after all the others of this rig."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in the stream")

    spools = sorted(rig.data.spools.glob("*.jsonl"))
    for path in spools:
        for line in path.read_text(encoding="utf-8").splitlines():
            json.loads(line, parse_constant=refuse)
    assert len(rig.starts.read_text().split()) == 1, "bad input ended the worker"
    rig.store.flush()
    rows = {r.id: r.status for r in rig.store.experiments(limit=1000)}
    assert rows == {p.stem: list(read_spool(p))[-1].event for p in spools}  # type: ignore[attr-defined]
    live = {name: rig.store.table(name) for name in TABLES}
    rig.store.rebuild()
    assert {name: rig.store.table(name) for name in TABLES} == live


# -- what the machine cannot give


def test_a_model_of_which_no_lane_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "100000")
    spec = ExperimentSpec(model=str(llama_folder()), workload={"id": "prompts"}, lanes=(parse_pipeline("knorm"),))  # type: ignore[arg-type]
    message = failure(list(run(spec)))
    assert "needs about" in message
    assert "are free on cpu" in message


@pytest.mark.parametrize(
    ("device", "limit", "part"),
    [
        ("cuda:99", "", "there is no device 'cuda:99' on this machine; allowed: cpu"),
        ("cpu", "2 GB", f"{LIMIT_VARIABLE} is '2 GB'"),
    ],
)
def test_a_worker_that_cannot_serve_says_why_and_leaves(
    device: str, limit: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, limit)
    out = io.StringIO()
    Server(device, out).loop([])
    [line] = out.getvalue().splitlines()
    assert part in failure([decode(line)])


# -- the installed command, from end to end

Start = Callable[..., Any]


def ended(process: Any) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in out + err, err
    return process.returncode, out, err


def strict(path: Path) -> dict[str, Any]:
    """The document, NaN and infinity refused."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in {path}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_a_device_that_is_not_there(pareto_studio: Start, tmp_path: Path) -> None:
    words = ["run", "--model", llama_folder(), "--workload", "prompts", "--device", "cuda:99", "--data-dir", tmp_path / "data"]
    code, out, err = ended(pareto_studio(*words))
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("there is no device 'cuda:99' on this machine; allowed: cpu")


def test_a_broken_model_ends_with_status_1_and_a_document(pareto_studio: Start, tmp_path: Path, models: dict[str, str]) -> None:
    words = ["run", "--model", models["nan"], "--workload", "prompts", "--set", f"text={TEXT}", "--threads", 1]
    code, _, err = ended(
        pareto_studio(*words, "--lane", "knorm", "--data-dir", tmp_path / "data", "--json", tmp_path / "out.json")
    )
    assert code == 1
    assert "lane 1 (knorm): the model's output is not a number (NaN)" in err
    report = strict(tmp_path / "out.json")
    assert [lane["status"] for lane in report["lanes"]] == ["failed", "failed"]
    assert [lane["outputs"] for lane in report["lanes"]] == [[], []]


ISSUE = {"pipeline": str, "status": str, "metrics": dict, "sources": dict, "ratios": dict, "interleaved": bool, "outputs": list}


@pytest.mark.slow
def test_files_sweeps_documents_replay_isolation_and_a_studio_beside_it(pareto_studio: Start, tmp_path: Path) -> None:
    color = {"name": "mine", "color": "red", "steps": [{"policy": "streamingllm", "knobs": {"keep": 0.5}, "why": "a try"}]}
    (tmp_path / "a.json").write_text(json.dumps(color))
    (tmp_path / "b.yaml").write_text("name: yours\nsteps:\n- policy: h2o\n  knobs: {keep: 0.5}\n  later: [1, 2]\n")
    data = DataDir.at(tmp_path / "data").open()
    common = ["--threads", 1, "--max-new-tokens", 4, "--eos", "ignore", "--set", f"text={TEXT}", "--data-dir", data.root]
    common = ["run", "--model", llama_folder(), "--workload", "prompts", *common]
    lanes = [
        "--lane",
        f"@{tmp_path / 'a.json'}",
        "--lane",
        f"@{tmp_path / 'b.yaml'}",
        "--lane",
        "knorm",
        "--sweep",
        "knorm.keep=0.25,0.5",
    ]
    with Store(data) as studio:
        code, out, err = ended(pareto_studio(*common, *lanes, "--json", tmp_path / "out.json"))
        assert code == 0, err
        report = strict(tmp_path / "out.json")
        studio.refresh()
        studio.flush()
        assert [(r.id, r.status) for r in studio.experiments()] == [(report["experiment"]["id"], "finished")]
        asked = "SELECT status, count(*) AS n FROM runs GROUP BY status"
        code, out, err = ended(pareto_studio("history", "--sql", asked, "--json", "--data-dir", data.root))
        assert (code, json.loads(out)) == (0, [{"status": "finished", "n": 5}]), err
    texts = ["baseline", "streamingllm:keep=0.5", "h2o:keep=0.5", "knorm:keep=0.25", "knorm:keep=0.5"]
    assert [lane["pipeline"] for lane in report["lanes"]] == texts
    for lane in report["lanes"]:
        assert all(isinstance(lane[key], kind) for key, kind in ISSUE.items())
        assert lane["sources"].keys() == lane["metrics"].keys()
        assert set(lane["sources"].values()) <= {"measured", "estimated", "simulated"}
        assert all(r.keys() == {"value", "low", "high", "n"} for r in lane["ratios"].values())
        assert len(lane["outputs"]) == 1
    for lane in report["lanes"][1:]:
        one, other = (x["metrics"]["prefill_kv_bytes"] for x in (lane, report["lanes"][0]))
        assert lane["ratios"]["prefill_kv_bytes"]["value"] == pytest.approx(one / other)
        assert one < other
    spec = report["experiment"]["spec"]
    assert spec["lanes"][1] == color, "what this version does not know was dropped"
    assert spec["lanes"][2]["steps"][0]["later"] == [1, 2]

    code, out, err = ended(
        pareto_studio("replay", tmp_path / "out.json", "--json", tmp_path / "again.json", "--data-dir", data.root)
    )
    assert code == 0, (out, err)
    again = strict(tmp_path / "again.json")
    assert again["experiment"]["spec"] == spec
    assert [x["outputs"] for x in again["lanes"]] == [x["outputs"] for x in report["lanes"]]

    apart = ["--isolate", "--lane", "streamingllm:keep=0.5", "--lane", "knorm:keep=0.25", "--json", tmp_path / "apart.json"]
    code, _, err = ended(pareto_studio(*common, *apart))
    assert code == 0, err
    alone = strict(tmp_path / "apart.json")["lanes"]
    together = [report["lanes"][i] for i in (0, 1, 3)]
    assert [x["status"] for x in alone] == ["finished"] * 3
    assert [x["outputs"] for x in alone] == [x["outputs"] for x in together]
    assert [x["metrics"]["kv_bytes"] for x in alone] == [x["metrics"]["kv_bytes"] for x in together]
    assert all("kv_bytes" in x["ratios"] for x in alone[1:])
