"""The real studio with its real worker for tests and pictures of the page: ``pareto-studio`` itself, and what it is asked to run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from studio_state.pipeline import pack_link
from tests.ui.conftest import start_server

PROGRAM = Path(sys.executable).with_name("pareto-studio")


def start_real_studio(data: Path, **environment: str) -> tuple[subprocess.Popen[bytes], str]:
    """``pareto-studio`` as a person starts it, one thread a worker, and its address."""
    command = [str(PROGRAM), "--port", "{port}", "--data-dir", str(data / "data")]
    return start_server(data, command, {"OMP_NUM_THREADS": "1", **environment})


def link(url: str, model: str, workload: str, options: dict[str, Any], settings: dict[str, Any]) -> str:
    """Address of the page with this experiment on it, without lanes."""
    state = {"model": model, "workload": workload, "options": options, "settings": settings, "device": "cpu", "lanes": []}
    return f"{url}/?p={pack_link(state)}"


def worker_of(studio: subprocess.Popen[bytes]) -> psutil.Process:
    """The worker process that a studio has now."""
    [worker] = [c for c in psutil.Process(studio.pid).children() if "workers" in c.cmdline()]
    return worker
