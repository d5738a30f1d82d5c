"""The walls between the rooms: who may import whom, read from the sources and seen in ``sys.modules``."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("app", "workers", "studio_state", "assets")

# who -> packages that none of its files may import, not even inside a function
WALLS = {
    "app": ("torch", "transformers", "diffusers", "safetensors", "workers"),
    "workers": ("gradio", "duckdb", "altair", "app"),
    "studio_state": ("torch", "transformers", "diffusers", "gradio", "altair", "app", "workers"),
    "workers/mechanisms": ("workers.policies", "workers.engine", "workers.serve", "workers.workloads"),
    "workers/families": ("workers.policies", "workers.engine", "workers.serve", "workers.workloads"),
    "workers/models": ("workers.policies", "workers.engine", "workers.serve", "workers.workloads"),
    "workers/data": ("workers.policies", "workers.engine", "workers.serve", "workers.workloads", "workers.recipes", "torch"),
    "workers/training": ("workers.policies", "workers.engine", "workers.serve", "workers.workloads", "workers.recipes"),
    "workers/workloads": ("workers.policies", "workers.engine", "workers.serve"),
    "workers/policies": ("workers.engine", "workers.serve", "workers.workloads", "workers.meters"),
    "app/components": ("app.views", "app.server", "app.dispatch", "app.cli"),
    "app/dispatch": ("app.views", "app.components", "app.server", "app.cli", "gradio"),
}
SHARED = ("workers.workloads.base",)  # what an item and a result are; everybody in the engine may know it


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """Full names that a file imports anywhere, relative ones resolved."""
    package = module_name(path).split(".") if path.stem == "__init__" else module_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])])
                if node.level
                else node.module or ""
            )
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("folder", WALLS)
def test_no_file_reaches_over_a_wall(folder: str) -> None:
    files = sources(folder)
    assert files
    over = {
        str(f.relative_to(ROOT)): n
        for f in files
        for n in imported(f)
        for p in WALLS[folder]
        if inside(n, p) and not n.startswith(SHARED)
    }
    assert over == {}


def test_no_method_imports_another() -> None:
    for folder in ("workers/policies", "workers/analyzers", "workers/recipes"):
        kind = folder.replace("/", ".")
        for path in sources(folder):
            others = {n for n in imported(path) if inside(n, kind)}
            assert not others, f"{path.relative_to(ROOT)} imports {sorted(others)}"


def test_only_declared_packages_are_imported() -> None:
    import tomllib
    from importlib.metadata import packages_distributions

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {d.partition("==")[0].lower().replace("_", "-") for d in project["dependencies"]}
    # these come with a declared one that is built on them: gradio on the first two, transformers on the third, torch with the last
    declared |= {"fastapi", "starlette", "uvicorn", "huggingface-hub", "tokenizers", "pillow", "fsspec", "triton"}
    providers = packages_distributions()
    foreign: dict[str, str] = {}
    for room in ("app", "workers", "studio_state"):
        for path in sources(room):
            for top in {n.split(".")[0] for n in imported(path) if n}:
                if top in sys.stdlib_module_names or top in ROOMS:
                    continue
                if not {d.lower().replace("_", "-") for d in providers.get(top, [top])} & declared:
                    foreign[str(path.relative_to(ROOT))] = top
    assert foreign == {}


def loaded_by(code: str) -> set[str]:
    """Top-level packages in ``sys.modules`` after running the code in a fresh interpreter."""
    script = f"{code}\nimport sys; print(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_the_command_line_starts_light() -> None:
    heavy = {"torch", "transformers", "diffusers", "gradio", "duckdb", "altair", "pandas", "numpy", "scipy", "workers"}
    assert not loaded_by("import app.__main__, app.cli") & heavy


def test_a_run_from_the_command_line_loads_no_engine_and_no_screen() -> None:
    code = "import app.cli_run, app.cli_replay, app.cli_lists, app.cli_fetch, app.cli_history, app.report"
    assert not loaded_by(code) & {"torch", "transformers", "diffusers", "gradio", "duckdb", "altair", "workers"}


def test_the_screen_loads_no_engine() -> None:
    assert not loaded_by("import app.server") & {"torch", "transformers", "diffusers", "workers"}


def test_the_engine_loads_no_screen() -> None:
    assert not loaded_by("import workers.serve") & {"gradio", "duckdb", "altair", "app"}


def test_the_contract_loads_neither_side() -> None:
    names = [module_name(p) for p in sources("studio_state")]
    assert not loaded_by(f"import {', '.join(names)}") & {"torch", "transformers", "gradio", "app", "workers"}
