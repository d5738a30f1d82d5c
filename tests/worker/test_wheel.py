"""The wheel works outside the checkout: assets travel with it, the worker describes itself, the page is built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from studio_state.catalog import Catalog

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content in a folder of its own, as an installer lays it out."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    target = out / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run(installed: Path, tmp_path: Path, *arguments: str) -> str:
    """Python outside the checkout that sees the wheel's content first."""
    env = {**os.environ, "PYTHONPATH": str(installed), "PARETO_STUDIO_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-P", *arguments], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_worker_describes_itself_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    assert Catalog.model_validate(json.loads(run(installed, tmp_path, "-m", "workers", "describe"))) == Catalog.load()


def test_assets_and_page_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, app, assets, studio_state\n"
        "from studio_state.catalog import asset\n"
        "import app.server\n"
        "print(app.__file__, asset('workloads/pride-and-prejudice.txt.gz').is_file(), 'torch' in sys.modules)"
    )
    text = run(installed, tmp_path, "-c", code)
    assert str(installed) in text
    assert text.split()[1:] == ["True", "False"]
