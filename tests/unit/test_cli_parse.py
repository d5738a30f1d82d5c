"""The command line without a model: words to spec, events to document, document to table, errors to one sentence."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from app.cli import read_auth, read_devices
from app.cli_replay import read_card
from app.cli_spec import build_lanes, check, make_spec, parse_settings, parse_sweep
from app.cli_table import remarks, result_table
from app.report import all_finished, document
from studio_state import events as ev
from studio_state.catalog import Card, Catalog, WorkloadCard
from studio_state.errors import SpecError, StudioError
from studio_state.experiment import ExperimentSpec, ModelInfo
from studio_state.pipeline import Pipeline
from studio_state.replay import compare

ROOT = Path(__file__).parents[2]
REPLAY_WORKER = ROOT / "tests" / "worker" / "replay_worker.py"


def sentences(call: Callable[[], Any]) -> list[str]:
    with pytest.raises(SpecError) as caught:
        call()
    return [p.sentence() for p in caught.value.problems]


# -- words to spec


def test_lanes_sweeps_and_the_baseline() -> None:
    lanes = build_lanes(["snapkv:keep=0.5,window=32", "rtn:bits=4+snapkv"], ["snapkv.keep=0.1,0.25"])
    assert [p.text() for p in lanes] == [
        "baseline",
        "snapkv:keep=0.1,window=32",
        "snapkv:keep=0.25,window=32",
        "rtn:bits=4+snapkv:keep=0.1",
        "rtn:bits=4+snapkv:keep=0.25",
    ]
    assert [p.text() for p in build_lanes([], [])] == ["baseline"]
    assert [p.text() for p in build_lanes(["baseline", "rtn"], [])] == ["baseline", "rtn"]
    crossed = build_lanes(["snapkv"], ["snapkv.keep=0.1,0.2", "snapkv.window=8,16"])
    assert [p.steps[0].knobs for p in crossed[1:]] == [{"keep": k, "window": w} for k in (0.1, 0.2) for w in (8, 16)]


def test_a_lane_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"name": "mine", "steps": [{"policy": "rtn", "knobs": {"bits": 4}}]}))
    assert build_lanes([f"@{file}"], [])[1].name == "mine"
    assert "cannot read the pipeline file" in sentences(lambda: build_lanes(["@/nowhere.json"], []))[0]


def test_everything_wrong_with_lanes_is_told_at_once() -> None:
    found = sentences(lambda: build_lanes(["rtn:bits", "?"], ["h2o.keep=0.1", "keep=1"]))
    assert len(found) == 4
    assert "write name=value" in found[0]
    assert "policies joined by '+'" in found[1]
    assert "no lane contains 'h2o'; add --lane h2o" in found[2]
    assert "write policy.knob=value,value" in found[3]
    too_many = sentences(lambda: build_lanes(["rtn"], ["rtn.group_size=" + ",".join(map(str, range(16)))]))
    assert too_many == ["17 lanes with the baseline; at most 16 are allowed, sweep fewer values"]


def test_settings_and_sweeps_are_read_as_values() -> None:
    assert parse_settings(["items=20", "text=two words", "deep=true", "x=", "depths=[0.1,0.5]", "n=1e-3"]) == {
        "items": 20,
        "text": "two words",
        "deep": True,
        "x": "",
        "depths": [0.1, 0.5],
        "n": 0.001,
    }
    assert "write name=value" in sentences(lambda: parse_settings(["items"]))[0]
    assert parse_sweep('a.b=[1,2],"x,y",z') == ("a", "b", [[1, 2], "x,y", "z"])


def test_fields_out_of_range_name_the_option() -> None:
    base = {"model": "m", "workload": {"id": "w"}}
    found = sentences(lambda: make_spec({**base, "batch": 0, "dtype": "int3", "sampling": {"top_p": 2}, "max_new_tokens": -1}))
    assert len(found) == 4
    for option, part in zip(("--dtype", "--batch", "--max-new-tokens", "--top-p"), found, strict=True):
        assert part.startswith(f"{option} ")
    assert sentences(lambda: make_spec({**base, "reference": 3})) == ["reference is lane 3, but there are 1 lanes (0 = baseline)"]


def test_auth_and_devices() -> None:
    assert read_auth(None) is None
    assert read_auth("ann:a:b") == ("ann", "a:b")
    for bad in ("ann", ":x", "ann:"):
        assert "write USER:PASS" in sentences(lambda bad=bad: read_auth(bad))[0]
    assert read_devices("cpu, cuda:0,cpu") == ("cpu", "cuda:0")
    assert "write names separated by commas" in sentences(lambda: read_devices(" ,"))[0]


def test_a_spec_is_checked_before_any_worker_starts() -> None:
    knobs = {"properties": {"keep": {"type": "number", "minimum": 0.05, "maximum": 1.0, "default": 0.5}}}
    catalog = Catalog(
        methods=[Card(id="snapkv", title="SnapKV", stage="kv", families=("llm",), knobs=knobs)],
        workloads=[
            WorkloadCard(id="speed", title="Speed", families=("llm",), options={"properties": {"items": {"type": "integer"}}})
        ],
    )
    lanes = build_lanes(["snapkv:keep=7,kepe=1", "snapvk"], [])
    spec = make_spec({"model": "m", "workload": {"id": "speed", "options": {"item": 2}}, "lanes": lanes})
    found = sentences(lambda: check(spec, catalog))
    assert len(found) == 4
    assert "no option 'item'; did you mean 'items'?" in found[0]
    assert found[1].startswith("lane 1: snapkv has no knob 'kepe'")
    assert "a number from 0.05 to 1.0" in found[2]
    assert "lane 2: there is no policy 'snapvk'; did you mean 'snapkv'?" in found[3]
    check(make_spec({"model": "m", "workload": {"id": "speed"}, "lanes": build_lanes(["snapkv"], [])}), catalog)


# -- events to document


def number(events: list[ev.Event]) -> list[ev.Event]:
    return [e.model_copy(update={"experiment": "20260101-000000-abcdef", "seq": i}) for i, e in enumerate(events)]


@pytest.fixture
def spec() -> ExperimentSpec:
    return make_spec({"model": "tiny", "workload": {"id": "speed"}, "lanes": [*build_lanes(["b:x=1+a"], []), Pipeline()]})


@pytest.fixture
def events(spec: ExperimentSpec) -> list[ev.Event]:
    middle: list[ev.Event] = []
    for lane in range(3):
        middle.append(ev.LaneStarted(lane=lane, order=("baseline", "a+b:x=1", "baseline")[lane], interleaved=lane != 2))
        for item, (speed, tokens) in enumerate([(10.0, 3), (20.0, 4), (60.0, 5)]):
            middle += [
                ev.ItemStarted(lane=lane, item=str(item), index=item, of=3),
                ev.Metric(lane=lane, name="decode_tokens_per_s", value=speed * (lane + 1), item=str(item)),
                ev.Metric(lane=lane, name="accepted_tokens", value=tokens, item=str(item)),
                ev.Output(
                    lane=lane, item=str(item), text=f"text {lane}.{item}", expected="text 0.0", correct=(lane, item) == (0, 0)
                ),
            ]
    middle += [
        ev.Metric(lane=1, name="perplexity", value=None),
        ev.Metric(lane=1, name="weight_bytes", value=1_500_000, source="estimated"),
        ev.Metric(lane=1, name="decode_tokens_per_s", value=41.0, low=39.0, high=43.0, n=3),
        ev.Ratio(lane=1, name="decode_tokens_per_s", value=2.05, low=1.9, high=2.2, n=3),
        ev.LaneFinished(lane=0, status="finished"),
        ev.LaneFinished(lane=1, status="finished", flags=["no effect: nothing was evicted"]),
        ev.LaneFinished(lane=2, status="failed", message="the lane ran out of memory", interleaved=False),
    ]
    return number(
        [
            ev.Submitted(spec=spec, t=100.0),
            ev.Started(environment={"torch": "2"}),
            ev.ModelLoaded(info=ModelInfo(name="tiny", family="llm", note="made of paper"), fits_baseline=True),
            *middle,
            ev.Finished(seconds=7.5),
        ]
    )


def test_the_document_has_the_agreed_shape(events: list[ev.Event], spec: ExperimentSpec) -> None:
    report = document(events)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    experiment = report["experiment"]
    assert (experiment["id"], experiment["status"], experiment["seconds"]) == ("20260101-000000-abcdef", "finished", 7.5)
    assert ExperimentSpec.model_validate(experiment["spec"]) == spec
    assert experiment["environment"] == {"torch": "2"}
    baseline, lane, failed = report["lanes"]
    assert {"pipeline", "status", "metrics", "sources", "ratios", "interleaved", "outputs"} <= lane.keys()
    assert [x["pipeline"] for x in report["lanes"]] == ["baseline", "b:x=1+a", "baseline"]
    assert lane["order"] == "a+b:x=1"
    assert lane["metrics"] == {
        "decode_tokens_per_s": 41.0,
        "accepted_tokens": 12.0,
        "perplexity": None,
        "weight_bytes": 1_500_000,
    }
    assert lane["sources"]["weight_bytes"] == "estimated"
    assert lane["sources"]["decode_tokens_per_s"] == "measured"
    assert lane["ratios"] == {"decode_tokens_per_s": {"value": 2.05, "low": 1.9, "high": 2.2, "n": 3}}
    assert baseline["metrics"] == {"decode_tokens_per_s": 20.0, "accepted_tokens": 12.0}, "median and sum of the items"
    assert baseline["outputs"][0] == {
        "item": "0",
        "repeat": 0,
        "kind": "text",
        "text": "text 0.0",
        "expected": "text 0.0",
        "correct": True,
        "data": {},
    }
    assert (failed["status"], failed["interleaved"]) == ("failed", False)
    assert not all_finished(report)


def test_a_document_of_a_run_that_died_keeps_what_was_measured(events: list[ev.Event]) -> None:
    report = document(
        [*events[:12], ev.Failed(experiment=events[0].experiment, seq=12, message="the worker was killed", phase="run")]
    )
    assert (report["experiment"]["status"], report["experiment"]["message"]) == ("failed", "the worker was killed")
    assert report["lanes"][0]["metrics"] == {"decode_tokens_per_s": 15.0, "accepted_tokens": 7.0}
    assert [x["status"] for x in report["lanes"]] == ["not finished"] * 3
    assert not all_finished(report)


def test_the_table_has_lanes_as_columns_and_ratios_with_intervals(events: list[ev.Event]) -> None:
    report = document(events)
    console = Console(file=io.StringIO(), width=200)
    console.print(result_table(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert rows["status"].split() == ["status", "finished", "finished", "failed"]
    assert rows["decode_tokens_per_s"].split() == [
        "decode_tokens_per_s",
        "20.0",
        "tokens/s",
        "41.0",
        "tokens/s",
        "60.0",
        "tokens/s",
    ]
    assert rows["weight_bytes"].split() == ["weight_bytes", "–", "1.50", "MB", "(estimated)", "–"]
    assert "2.05× [1.90 to 2.20]" in text
    assert remarks(report) == [
        "lane 1 (b:x=1+a): no effect: nothing was evicted",
        "lane 2 (baseline): the lane ran out of memory",
        "made of paper",
        "the lanes did not fit into memory together and ran one after the other (interleaved: false)",
    ]


def test_replay_compares_counts_exactly_and_speed_loosely(events: list[ev.Event], tmp_path: Path) -> None:
    before, now = document(events), document(events)
    now["lanes"][0]["metrics"]["decode_tokens_per_s"] *= 1.08
    now["lanes"][1]["metrics"]["decode_tokens_per_s"] *= 0.8
    now["lanes"][1]["metrics"]["weight_bytes"] += 1
    rows = {(r.lane, r.metric): (r.verdict, r.binding) for r in compare(before, now)}
    assert rows[0, "decode_tokens_per_s"] == ("same", False)
    assert rows[1, "decode_tokens_per_s"] == ("different", False)
    assert rows[1, "weight_bytes"] == ("different", True)
    assert rows[1, "perplexity"] == ("same", True)
    assert len(rows) == 2 + 4 + 2
    card = tmp_path / "card.json"
    card.write_text(json.dumps(before))
    assert read_card(card)[0] == ExperimentSpec.model_validate(before["experiment"]["spec"])


def test_replay_refuses_what_is_no_document(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    assert "cannot read" in sentences(lambda: read_card(file))[0]
    for text in ("{", "[1]", '{"experiment": 3}', '{"experiment": {"spec": null}}', '{"experiment": {"spec": {}}, "lanes": 3}'):
        file.write_text(text)
        assert "give a document written by --json" in sentences(lambda: read_card(file))[0]
    file.write_bytes(b"\x00\xff\xfe")
    assert "cannot read" in sentences(lambda: read_card(file))[0]


# -- the process


def studio(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_a_refused_run_prints_every_reason_on_a_line_and_exits_with_2() -> None:
    done = studio("run", "--model", "m", "--workload", "speed", "--lane", "rtn:bits", "--lane", "?x")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 2
    assert "Traceback" not in done.stderr
    done = studio("run", "--model", "m", "--workload", "speed", "--batch", "0")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert studio("run", "--model", "m").returncode == 2


def test_errors_are_one_sentence_and_debug_shows_more(tmp_path: Path) -> None:
    done = studio("zoo", "fetch", "nothing-like-this")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "the zoo has no model 'nothing-like-this'" in done.stderr
    assert "Traceback" in studio("--debug", "zoo", "fetch", "nothing-like-this").stderr
    file = tmp_path / "data"
    file.write_text("not a folder")
    done = studio("history", "20260101-000000-abcdef", "--data-dir", str(tmp_path / "none"))
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


@pytest.mark.parametrize("words", [("methods",), ("workloads",), ("models",), ("zoo", "list")])
def test_lists_as_json_and_as_tables(words: tuple[str, ...]) -> None:
    done = studio(*words, "--json")
    assert done.returncode == 0, done.stderr
    ids = [entry["id"] for entry in json.loads(done.stdout)]
    assert ids
    table = studio(*words)
    assert table.returncode == 0, table.stderr
    assert all(name in table.stdout for name in ids)


RUN = """
import sys
from pathlib import Path
from app.__main__ import explain
from app.cli_run import run_and_show
from app.cli_spec import build_lanes, make_spec
from app.dispatch.runner import Settings
from studio_state.paths import DataDir
model, data, worker, out = sys.argv[1:]
spec = make_spec({"model": model, "workload": {"id": "speed"}, "lanes": build_lanes(["x"], [])})
settings = Settings(command=lambda device: [sys.executable, worker], grace_s=5)
try:
    sys.exit(run_and_show(spec, DataDir.at(data).open(), settings, Path(out))[1])
except Exception as e:
    sys.exit(explain(e))
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    def start(model: str, out: Path = tmp_path / "out.json") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUN, model, str(tmp_path / "data"), str(REPLAY_WORKER), str(out)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PARETO_STUDIO_LOCKS": str(tmp_path / "locks")}
        return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment)

    return start


def test_a_run_ends_with_a_table_a_document_and_status_0(run: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = run("steps=3")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    report = json.loads((tmp_path / "out.json").read_text())
    assert [x["status"] for x in report["lanes"]] == ["finished", "finished"]
    assert report["lanes"][0]["metrics"] == {"new_tokens": 1}
    assert "new_tokens" in out
    assert report["experiment"]["id"] in out
    shown = studio("history", report["experiment"]["id"], "--json", "--data-dir", str(tmp_path / "data"))
    assert json.loads(shown.stdout) == report


def test_a_run_whose_worker_dies_keeps_its_part_and_exits_with_1(
    run: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = run("steps=4-torn")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ended by SIGKILL" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "out.json").read_text())["lanes"][0]["metrics"] == {"new_tokens": 0.5}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_cancels_in_order(run: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: signal.Signals) -> None:
    process = run("steps=100000-slow")
    deadline = time.monotonic() + 60
    while not any('"metric"' in p.read_text() for p in (tmp_path / "data").glob("spool/*.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "cancelling" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "out.json").read_text())["experiment"]["status"] == "cancelled"


def test_a_result_file_that_cannot_be_written_is_told_before_the_run(
    run: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = run("steps=3", tmp_path / "nowhere" / "out.json")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "choose a file in a folder that exists" in err
    assert not list((tmp_path / "data" / "spool").iterdir())


def test_every_error_class_is_explained_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from app.__main__ import explain

    assert explain(StudioError("one sentence")) == 1
    assert explain(SpecError("refused")) == 2
    assert explain(ValueError("a bug")) == 1
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        "one sentence",
        "refused",
        "unexpected error",
    ]
