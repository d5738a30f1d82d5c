"""Thirty simulated sessions watch one race at five updates a second: prints the server's CPU and how late updates come.

``python -m tests.ui.load_sessions [--sessions 30] [--seconds 20]``. Not a test: figures depend on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import websockets
from gradio_client import Client
from playwright.sync_api import sync_playwright

from app.live import LOOK_EVERY_S
from tests.browser import launch_options
from tests.ui.conftest import CHROMIUM_ARGS, start_studio, stop


def socket_address(url: str) -> str:
    """The live socket that a real page was given."""
    with sync_playwright() as p:
        browser = p.chromium.launch(**launch_options(), args=CHROMIUM_ARGS)
        page = browser.new_page()
        with page.expect_websocket() as found:
            page.goto(url)
        browser.close()
        return found.value.url


async def watch(address: str, origin: str, experiment: str, until: float) -> list[float]:
    """Seconds between the updates that one session got."""
    gaps: list[float] = []
    async with websockets.connect(address, origin=origin, max_size=None) as socket:  # type: ignore[arg-type]
        await socket.send(json.dumps({"watch": experiment}))
        last = time.monotonic()
        while (left := until - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(socket.recv(), left)
            except TimeoutError:
                break
            now = time.monotonic()
            gaps.append(now - last)
            last = now
    return gaps


async def watch_all(sessions: int, *what: object) -> list[list[float]]:
    """All sessions at once."""
    return await asyncio.gather(*(watch(*what) for _ in range(sessions)))  # type: ignore[arg-type]


def main() -> None:
    """Start a studio, let it race, watch it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process, url = start_studio(Path(folder), step_s=0.05)
        try:
            address = socket_address(url)
            started = Client(url, verbose=False).predict(
                "smollm2-135m", "prompts", ["snapkv"], {"items": 50}, {}, "cpu", api_name="/run"
            )
            server = psutil.Process(process.pid)
            before, begun = server.cpu_times(), time.monotonic()
            gaps = asyncio.run(watch_all(options.sessions, address, url, started["experiment"], begun + options.seconds))
            after, took = server.cpu_times(), time.monotonic() - begun
        finally:
            stop(process)
    cpu = after.user + after.system - before.user - before.system
    late = sorted(max(0.0, g - LOOK_EVERY_S) for session in gaps for g in session[1:])
    print(
        f"{options.sessions} sessions, {took:.0f} s: {sum(map(len, gaps)) / took:.0f} updates/s of {options.sessions / LOOK_EVERY_S:.0f} asked"
    )
    print(f"server CPU {100 * cpu / took:.0f} % of one core; lateness median {1000 * statistics.median(late):.0f} ms, p95 {1000 * late[int(0.95 * len(late))]:.0f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
