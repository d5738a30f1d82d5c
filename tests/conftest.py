"""Shared fixtures. Tests never touch a person's data: the data directory is a temporary one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")


@pytest.fixture(autouse=True, scope="session")
def _own_data_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every process that the tests start inherits it; the model cache stays the user's own."""
    os.environ["PARETO_STUDIO_DATA"] = str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """Folder of a 2-layer random Llama with a real tokenizer."""
    from tests.tiny import llama_folder

    return llama_folder()
