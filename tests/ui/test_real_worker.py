"""Journeys on the real page with the real worker and a tiny model: the numbers of the command line, reload, queue, cancel, a kill, no network."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.ui.acts import card, drag_into, example, lane_column, run, steps, wait_status
from tests.ui.conftest import open_studio, stop
from tests.ui.real_studio import PROGRAM, link, start_real_studio, worker_of

pytestmark = pytest.mark.browser

PATIENCE_MS = 90_000
SHORT = {"threads": 1, "max_new_tokens": 8, "eos": "ignore"}
LONG = {**SHORT, "max_new_tokens": 1800, "repeats": 500}  # never ends by itself within a test
NEEDLE = {"items": 2, "length": 96}
TEXT = {"text": "The secret number for Lisbon is 4071, and the secret number for Oslo is 2938; remember both of them well. " * 2}
SAME_EVERYWHERE = (
    "weight_bytes", "kv_bytes", "prefill_kv_bytes", "prompt_tokens", "new_tokens", "kept_prompt_tokens", "cached_tokens", "forward_passes",
    "accuracy", "kl_to_baseline", "top1_agreement", "first_divergence", "same_output",
)  # fmt: skip
UNITS = {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "%": 0.01, "tokens": 1, "passes": 1, "nats": 1}


class Real(NamedTuple):
    """A running studio: process, address, the file of its audit hook, and what the command line measured meanwhile."""

    process: subprocess.Popen[bytes]
    url: str
    audit: Path
    model: str
    command_line: subprocess.Popen[str]
    document: Path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Real]:
    """The studio, and the command line at the same experiment in a data directory and with a lock of its own."""
    home = tmp_path_factory.mktemp("real")
    audit, document = home / "audit.jsonl", home / "cli.json"
    words = [PROGRAM, "run", "--model", tiny_llama, "--workload", "needle", "--lane", "snapkv:keep=0.5", "--lane", "rtn:bits=4"]
    words += [
        "--threads",
        1,
        "--max-new-tokens",
        8,
        "--eos",
        "ignore",
        "--set",
        "items=2",
        "--set",
        "length=96",
        "--json",
        document,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PARETO_STUDIO_LOCKS": str(home / "cli-locks")}
    command_line = subprocess.Popen(
        [*map(str, words), "--data-dir", str(home / "cli")], stdout=-1, stderr=-1, text=True, env=environment
    )
    process, url = start_real_studio(
        home, PYTHONPATH=str(Path(__file__).with_name("audit")), PARETO_STUDIO_AUDIT=str(audit), TOKENIZERS_PARALLELISM="false"
    )
    yield Real(process, url, audit, str(tiny_llama), command_line, document)
    stop(process)
    command_line.kill()
    command_line.communicate()


def shown(page: Page, metric: str) -> list[float | None]:
    """A row of the table of results, one number a lane, in plain units."""
    cells = page.locator(f".lr-results tr[data-metric={metric}] td").all()
    return [
        number(c.locator(".lr-value").inner_text(), c.locator(".lr-unit").inner_text())
        if c.locator(".lr-value").count()
        else None
        for c in cells
    ]


def number(text: str, unit: str) -> float:
    """``1.5``, ``kB`` -> 1500."""
    return float(text.replace(",", "")) * UNITS[unit.strip()]


def start_long(page: Page) -> None:
    """Half the cache on a long generation, begun."""
    example(page, "Half the cache")
    run(page)
    expect(lane_column(page, 0).locator(".lr-out")).not_to_be_empty(timeout=PATIENCE_MS)


def test_a_dragged_race_shows_the_numbers_of_the_command_line(page: Page, real: Real) -> None:
    open_studio(page, link(real.url, real.model, "needle", NEEDLE, SHORT))
    lanes = page.locator("[data-lane]")
    drag_into(page, card(page, "snapkv"), lanes.nth(0).locator("[data-steps]"))
    page.get_by_role("button", name="+ Add a lane").click()
    drag_into(page, card(page, "rtn"), lanes.nth(1).locator("[data-steps]"))
    assert (steps(page, 0), steps(page, 1)) == (["SnapKV"], ["Round-to-nearest"])
    page.get_by_role("spinbutton", name="bits").fill("4")
    page.keyboard.press("Tab")
    run(page)
    wait_status(page, "finished", timeout=PATIENCE_MS)
    _, errors = real.command_line.communicate(timeout=PATIENCE_MS / 1000)
    assert real.command_line.returncode == 0, errors
    report = json.loads(real.document.read_text())
    for metric in SAME_EVERYWHERE:
        expected = [lane["metrics"].get(metric) for lane in report["lanes"]]
        assert any(v is not None for v in expected), metric
        assert shown(page, metric) == [None if v is None else pytest.approx(v, rel=0.005) for v in expected], metric
    for i, lane in enumerate(report["lanes"]):
        column = lane_column(page, i)
        expect(column).to_contain_text("finished · 2 of 2")
        text = [o["text"] for o in lane["outputs"]][-1]
        seen = column.locator(".lr-out").evaluate(
            "(node) => [...node.childNodes].filter((n) => n.nodeName !== 'DEL').map((n) => n.textContent).join('')"
        )
        assert seen == text
    kept = report["lanes"][1]["metrics"]["kept_prompt_tokens"]
    expect(page.locator(".lr-map")).to_contain_text(re.compile(rf"keeps {kept:,.0f} of \d+ prompt tokens"))
    assert report["lanes"][2]["metrics"]["weight_bytes"] < report["lanes"][0]["metrics"]["weight_bytes"]


def test_unload_frees_the_model_and_the_next_run_loads_it_again(page: Page, real: Real) -> None:
    open_studio(page, link(real.url, real.model, "prompts", TEXT, SHORT))
    run(page)
    wait_status(page, "finished", timeout=PATIENCE_MS)
    unload = page.get_by_role("button", name="Unload model")
    for sentence in ("The model was unloaded; its memory is free again.", "No model was loaded."):
        expect(unload).to_be_enabled()
        unload.click()
        expect(page.locator("#unload-said")).to_have_text(sentence)
    run(page)
    wait_status(page, "finished", timeout=PATIENCE_MS)
    expect(page.locator(".lr-head")).not_to_contain_text("unloaded")


@pytest.mark.slow
def test_reload_fair_queue_and_cancel(page: Page, browser: Browser, real: Real) -> None:
    open_studio(page, link(real.url, real.model, "prompts", TEXT, LONG))
    start_long(page)
    worker = worker_of(real.process).pid
    page.reload()
    expect(lane_column(page, 0).locator(".lr-out")).not_to_be_empty(timeout=PATIENCE_MS)
    expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Unload model")).to_be_disabled()
    other = open_studio(browser.new_context().new_page(), link(real.url, real.model, "prompts", TEXT, SHORT))
    assert steps(other) == []  # another person's page, another pipeline
    example(page, "Half the cache")
    for place in (1, 2):
        run(page)
        expect(page.locator(".lr-head")).to_contain_text(f"Waiting in the queue: place {place}")
    example(other, "4-bit weights")
    run(other)
    expect(other.locator(".lr-head")).to_contain_text("Waiting in the queue: place 2")
    expect(page.locator(".lr-head")).to_contain_text("Waiting in the queue: place 3")  # the other one's turn comes first
    cancel(page)
    for status in ("queued", "running"):  # newest first: the last one is this person's
        open_others(page)
        page.locator(".lr-others li", has_text=status).last.get_by_role("button").click()
        cancel(page)
    wait_status(other, "finished", timeout=PATIENCE_MS)
    assert worker_of(real.process).pid == worker  # all of that without losing the worker
    other.context.close()


def cancel(page: Page) -> None:
    """Cancel the watched run and wait until it is over."""
    page.get_by_role("button", name="Cancel", exact=True).click()
    wait_status(page, "cancelled")


def open_others(page: Page) -> None:
    """Show the list of runs."""
    others = page.locator(".lr-others")
    if others.get_attribute("open") is None:
        others.locator("summary").click()


def test_a_killed_worker_is_told_and_the_next_run_works(page: Page, real: Real) -> None:
    open_studio(page, link(real.url, real.model, "prompts", TEXT, LONG))
    start_long(page)
    worker_of(real.process).kill()
    wait_status(page, "failed")
    alert = page.locator(".lr-head [role=alert]")
    expect(alert).to_contain_text("the worker process was ended by SIGKILL during the experiment")
    expect(alert).to_contain_text("what was measured before is kept")
    assert "Traceback" not in page.locator("body").inner_text()
    open_studio(page, link(real.url, real.model, "prompts", TEXT, SHORT))
    example(page, "Half the cache")
    run(page)
    wait_status(page, "finished", timeout=PATIENCE_MS)
    expect(lane_column(page, 1)).to_contain_text("finished")


def test_no_socket_of_app_or_worker_leaves_the_machine(page: Page, real: Real) -> None:
    open_studio(page, link(real.url, real.model, "prompts", TEXT, SHORT))
    run(page)
    wait_status(page, "finished", timeout=PATIENCE_MS)
    lines = [json.loads(line) for line in real.audit.read_text().splitlines()]
    started = {line["pid"]: line["command"] for line in lines if line["event"] == "start"}
    assert real.process.pid in started
    assert worker_of(real.process).pid in started
    asked = [line for line in lines if line["event"] != "start"]
    assert any(line["pid"] == real.process.pid and line["event"] == "socket.connect" for line in asked), "the hook saw nothing"
    away = [line for line in asked if not stays_here(line["address"])]
    assert away == []


def stays_here(address: Any) -> bool:
    """True for a unix socket, loopback, and the wildcard that a server binds."""
    host = address[0] if isinstance(address, list) else address
    if host is None or host == "localhost" or (isinstance(host, str) and host.startswith(("/", "\0"))):
        return True
    try:
        parsed = ipaddress.ip_address(str(host))
    except ValueError:
        return False
    return parsed.is_loopback or parsed.is_unspecified
