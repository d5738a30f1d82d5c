"""A real studio process and a real browser for every test of the page."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser import launch_options

expect.set_options(timeout=20_000)  # a busy machine is slow; nothing here measures time
APP = Path(__file__).with_name("studio_app.py")
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args: dict[str, Any]) -> dict[str, Any]:
    """The Chromium that all tests use, quiet on the network."""
    return {**browser_type_launch_args, **launch_options(), "args": CHROMIUM_ARGS}


@pytest.fixture(scope="session")
def browser_context_args(browser_context_args: dict[str, Any]) -> dict[str, Any]:
    """Tall enough that nothing scrolls away while it is dragged."""
    return {**browser_context_args, "viewport": {"width": 1360, "height": 1700}}


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_studio(data: Path, *flags: str, step_s: float = 0.01) -> tuple[subprocess.Popen[bytes], str]:
    """A running studio with the replaying worker, and its address."""
    return start_server(data, [sys.executable, str(APP), "{port}", str(data), *flags], {"REPLAY_STEP_S": str(step_s)})


def start_server(data: Path, command: list[str], environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], str]:
    """A studio process that answers, and its address.

    Args:
        data: its folder; also that of its device locks, so that it has the device for itself.
        command: ``{port}`` stands for a free port.
        environment: what it gets besides this process' own.
    """
    port = free_port()
    with open(data / "app.log", "wb") as log:
        process = subprocess.Popen(
            [word.format(port=port) for word in command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PARETO_STUDIO_LOCKS": str(data / "locks"), **environment},
        )
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError((data / "app.log").read_text())
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return process, url
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise RuntimeError("the studio did not start: " + (data / "app.log").read_text())


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a studio in order."""
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="session")
def studio_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One studio for all tests that do not change how it runs."""
    process, url = start_studio(tmp_path_factory.mktemp("studio"))
    yield url
    stop(process)


@pytest.fixture
def another_studio(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Start a studio of one's own: ``another_studio("--auth", step_s=0.1)``."""
    started = []

    def start(*flags: str, step_s: float = 0.01) -> str:
        process, url = start_studio(tmp_path, *flags, step_s=step_s)
        started.append(process)
        return url

    yield start
    for process in started:
        stop(process)


@pytest.fixture
def studio(page: Page, studio_url: str) -> Page:
    """The page, ready to be used."""
    return open_studio(page, studio_url)


def open_studio(page: Page, url: str) -> Page:
    """Open the studio and wait until editor and live view stand."""
    page.goto(url)
    page.locator("#editor[data-ready='1'], #editor [data-ready='1']").first.wait_for()
    page.locator("#race[data-ready='1'], #race [data-ready='1']").first.wait_for()
    expect(page.locator("#model-facts")).not_to_contain_text("…", timeout=30_000)  # the worker has told what the model is
    page.locator("#editor[data-checks=done], #editor [data-checks=done]").first.wait_for()  # the palette says what fits it
    return page
