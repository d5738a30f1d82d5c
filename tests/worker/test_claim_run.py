"""Claims, run cards and replays on a tiny model through the real engine; one claim through the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from studio_state.claims import Claim
from studio_state.events import Event, Submitted
from studio_state.experiment import ExperimentSpec
from studio_state.journal import read_journal, replay
from studio_state.paths import DataDir
from studio_state.replay import compare_runs
from studio_state.results import Results, results_of
from studio_state.runcard import RunCard, card_from_bytes
from studio_state.runcard_record import export_card, import_card
from studio_state.spool import SpoolWriter, new_experiment_id, read_spool
from studio_state.verdicts import judge
from workers.engine import run
from workers.host import ModelHost

ROOT = Path(__file__).parents[2]
TOKENS, KEPT = 240, 60 + 1  # PromptDistill at keep=0.25: a quarter of the prompt, and its last token


@pytest.fixture(scope="module")
def host() -> ModelHost:
    return ModelHost()


def recorded(data: DataDir, host: ModelHost, spec: ExperimentSpec) -> str:
    """Run an experiment and record it as the dispatcher does; returns its id."""
    experiment = new_experiment_id()
    with SpoolWriter(data.spool(experiment)) as spool:
        events: list[Event] = [Submitted(spec=spec, origin="claim"), *run(spec, host)]
        spool.append_all(events)
    return experiment


def small_claim(model: Path) -> Claim:
    """PromptDistill's cache formula on two layers, of which one reads the whole prompt, and a limit nothing can meet."""
    formula = (TOKENS + KEPT) / (2 * TOKENS)
    common = {"source": "worked out by hand", "experiment": "a"}
    return Claim.model_validate(
        {
            "id": "small", "title": "Small", "reference": "none", "headline": "h", "source": "s", "fallback": "f", "minutes": 1,
            "experiments": [
                {
                    "id": "a", "model": str(model), "lanes": ["baseline", "promptdistill:keep=0.25", "knorm:keep=0.5"],
                    "workload": {"id": "speed", "options": {"items": 1, "prompt_tokens": TOKENS, "new_tokens": 3}},
                    "settings": {"repeats": 3, "threads": 1},
                },
            ],
            "checks": [
                {"id": "cache", "text": "the cache has the size of the formula", "kind": "ratio", "metric": "prefill_kv_bytes",
                 "at_least": formula - 1e-9, "at_most": formula + 1e-9, **common},
                {"id": "order", "text": "a half is less than two thirds is less than all", "kind": "ordering",
                 "metric": "prefill_kv_bytes", "order": [2, 1, 0], **common},
                {"id": "never", "text": "a thousand times faster", "kind": "ratio", "metric": "ttft_s", "at_most": 0.001,
                 "headline": False, **common},
            ],
            "log": [{"date": "2026-01-31", "digest": "0" * 16, "reason": "set before the first run"}],
        }
    )  # fmt: skip


def test_a_claim_is_judged_from_what_the_engine_recorded(host: ModelHost, tiny_llama: Path, tmp_path: Path) -> None:
    data, claim = DataDir.at(tmp_path).open(), small_claim(tiny_llama)
    experiment = recorded(data, host, claim.experiments[0].spec())
    found = judge(claim, {"a": results_of(read_spool(data.spool(experiment)))})
    assert found.verdict == "reproduced", found
    assert found.runs == {"a": experiment}
    cache, order, never = found.checks
    assert cache.value == (TOKENS + KEPT) / (2 * TOKENS)
    per_token = 2 * 2 * 2 * 16 * 4  # layers x (K, V) x KV heads x head width x float32
    assert order.value == min((TOKENS + KEPT - TOKENS) * per_token / 2, (TOKENS - KEPT) * per_token / 2)
    assert never.outcome in ("direction only", "not shown")
    assert never.n == 3
    assert never.low is not None


def test_a_run_card_of_a_run_and_the_same_run_again(host: ModelHost, tiny_llama: Path, tmp_path: Path) -> None:
    data = DataDir.at(tmp_path).open()
    spec = ExperimentSpec.model_validate(
        {
            "model": str(tiny_llama), "workload": {"id": "prompts", "options": {"text": "The quick brown fox jumps over the lazy dog. " * 5}},
            "lanes": [{}, {"steps": [{"policy": "snapkv", "knobs": {"keep": 0.5, "window": 4}}]}], "threads": 1, "max_new_tokens": 8, "eos": "ignore",
        }
    )  # fmt: skip
    first, again = (recorded(data, host, spec) for _ in range(2))
    card: RunCard = card_from_bytes(export_card(data, first).text().encode())
    assert card.lanes[1].outputs[0].tokens == 8
    assert card.experiment.workload_digest == export_card(data, again).experiment.workload_digest
    found = compare_runs(card.document(), export_card(data, again).document())
    assert found.verdict == "same", found.sentences()
    assert [(o.same, o.total) for o in found.outputs] == [(1, 1), (1, 1)]
    other = recorded(data, host, spec.model_copy(update={"seed": 1, "max_new_tokens": 7}))
    differs = compare_runs(card.document(), export_card(data, other).document())
    assert differs.verdict == "different"
    assert [w.split()[3] for w in differs.why if w.startswith("asked for differently")] in (
        ["seed", "max_new_tokens"],
        ["max_new_tokens", "seed"],
    )
    results: Results = results_of(read_spool(data.spool(import_card(data, card, "card.json"))))
    assert results.status == "finished"
    assert results.lanes[1].value("prefill_kv_bytes") == card.lanes[1].metrics["prefill_kv_bytes"]


@pytest.mark.slow
def test_a_claim_from_the_command_line(tiny_llama: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PARETO_STUDIO_LOCKS": str(tmp_path / "locks")}
    command = [
        sys.executable,
        "-m",
        "app",
        "claim",
        "streamingllm",
        "--json",
        "--model",
        str(tiny_llama),
        "--data-dir",
        str(tmp_path / "data"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert {c["id"] for c in verdict["checks"]} == {"breakdown", "quality", "cache"}
    assert next(c["outcome"] for c in verdict["checks"] if c["id"] == "cache") == "reproduced"
    data = DataDir.at(tmp_path / "data")
    entries = read_journal(data.journal).entries
    assert list(replay(entries).verdicts) == [(verdict["runs"]["text"], "streamingllm")]
    assert results_of(read_spool(data.spool(verdict["runs"]["text"]))).origin == "claim"
