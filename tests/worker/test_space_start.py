"""An assembled Space starts as the Hub starts it, and races: a Python without the project, its folder as the working folder, no network."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from app.space import ENTRY, assemble
from studio_state.spool import read_spool

PATIENCE_S = 120


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment that sees the packages of this one, but neither the project nor its metadata."""
    root = tmp_path_factory.mktemp("bare")
    venv.create(root / "env", with_pip=False, symlinks=True)
    packages = root / "packages"
    packages.mkdir()
    import gradio

    for entry in Path(gradio.__file__).parents[1].iterdir():
        if "pareto_studio" not in entry.name.replace("-", "_") and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (root / "env" / "lib" / version / "site-packages" / "packages.pth").write_text(f"{packages}\n")
    return root / "env" / "bin" / "python"


def environment(home: Path, **more: str) -> dict[str, str]:
    """Only what is named here: nothing of this process leads to the checkout."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "LANG") if name in os.environ}
    return {
        **kept, "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "PARETO_STUDIO_LOCKS": str(home / "locks"),
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SYSTEM": "spaces", "SPACE_ID": "you/studio", "SPACE_HOST": "you-studio.hf.space",
        "SPACE_AUTHOR_NAME": "you", "SPACE_REPO_NAME": "studio", **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def started(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """The process, its address, and a folder with ``space``, ``home`` and ``bucket`` in it."""
    place = tmp_path_factory.mktemp("hub")
    assemble(place / "space")
    (place / "home").mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = environment(place / "home", GRADIO_SERVER_PORT=str(port), STUDIO_DATA=str(place / "bucket"))
    with open(place / "log", "wb") as log:
        process = subprocess.Popen([python, ENTRY], cwd=place / "space", env=env, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE_S
        while status(url) != 200:
            assert process.poll() is None, (place / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (place / "log").read_text()[-3000:]
            time.sleep(0.1)
        yield process, url, place
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def status(url: str) -> int:
    """HTTP status; 0 while nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as e:
        return e.code
    except OSError:
        return 0


def test_the_project_cannot_be_imported_from_elsewhere(python: Path, tmp_path: Path) -> None:
    names = ("gradio", "torch", "app", "workers", "studio_state", "assets")
    code = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "['gradio', 'torch']", done.stdout + done.stderr


def test_a_race_in_the_space_is_kept_and_strangers_are_bounded(started: tuple[subprocess.Popen[bytes], str, Path]) -> None:
    process, url, place = started
    client = Client(url, verbose=False, httpx_kwargs={"timeout": 60})

    def run(model: str, options: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        return client.predict(model, "classify", ["tome:keep=0.7"], options, {"threads": 1, **settings}, "cpu", api_name="/run")

    experiment = run("fashion-vit", {"items": 2}, {})["experiment"]
    for wrong, sentence in (
        ((str(place / "home"), {}, {}), "cannot be opened here"),
        (("assets/zoo", {}, {}), "cannot be opened by path here"),
        (("fashion-vit", {"source": "/etc"}, {}), "of the host cannot be opened here"),
        (("fashion-vit", {"items": 10_000}, {}), "at most 300"),
        (("org/name", {}, {"trust_remote_code": True}), "that a model brings along is not run here"),
    ):
        with pytest.raises(AppError, match=sentence):
            run(*wrong)
    for path in ("/etc/passwd", place / "space" / ENTRY, place / "bucket"):
        assert status(f"{url}/gradio_api/file={path}") in (403, 404)

    found, deadline = {"status": "queued"}, time.monotonic() + PATIENCE_S
    while found["status"] not in ("finished", "failed", "cancelled", "interrupted"):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
        found = client.predict(experiment, api_name="/status")
    assert found["status"] == "finished", found
    assert [lane["status"] for lane in found["lanes"]] == ["finished", "finished"]
    assert all(0 <= lane["metrics"]["accuracy"] <= 1 for lane in found["lanes"])
    client.close()

    process.send_signal(signal.SIGTERM)  # how a Space is stopped
    assert process.wait(PATIENCE_S) == 0, (place / "log").read_text()[-3000:]
    kept = place / "bucket" / "spool" / f"{experiment}.jsonl"
    assert [e.event for e in read_spool(kept)][-1] == "finished"
    assert [p.name for p in (place / "space").rglob("*.jsonl")] == ["prompts.jsonl"]
