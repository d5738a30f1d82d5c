"""Shared fixtures. Tests never touch a person's data: the data directory is a temporary one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")


@pytest.fixture(autouse=True, scope="session")
def _own_data_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every process that the tests start inherits it; the model cache stays the user's own."""
    os.environ["PARETO_STUDIO_DATA"] = str(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True, scope="session")
def _own_device_locks(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests do not wait for a studio that a person runs on this machine."""
    os.environ["PARETO_STUDIO_LOCKS"] = str(tmp_path_factory.mktemp("locks"))


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """Folder of a 2-layer random Llama with a real tokenizer."""
    from tests.tiny import llama_folder

    return llama_folder()


Command = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def pareto_studio() -> Command:
    """Starts the installed command as a user would: offline, one thread a worker; keywords are handed to ``Popen``."""
    program = Path(sys.executable).with_name("pareto-studio")

    def start(*words: object, env: dict[str, str] | None = None, **more: object) -> subprocess.Popen[str]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})}
        return subprocess.Popen([program, *map(str, words)], stdout=-1, stderr=-1, text=True, env=environment, **more)  # type: ignore[call-overload]

    return start
