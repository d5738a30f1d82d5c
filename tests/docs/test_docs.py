"""The documentation is executed, and its generated parts are fresh."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from studio_state import glossary
from studio_state.catalog import Catalog, asset
from studio_state.metrics import METRICS
from studio_state.resources import RESOURCES

ROOT = Path(__file__).parents[2]


def blocks(page: str, label: str) -> str:
    return "\n".join(re.findall(rf"^```python {label}\n(.*?)^```$", page, re.S | re.M))


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """The guide's policy and its oracle, executed as one module."""
    page = asset("docs/contributing.md").read_text()
    names: dict[str, Any] = {"__name__": "contributing_example"}
    exec(compile(blocks(page, "policy") + "\n" + blocks(page, "oracle"), "contributing.md", "exec"), names)
    return names


def test_the_guides_oracle_passes(example: dict[str, Any]) -> None:
    tests = [value for name, value in example.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_the_guides_card_is_complete(example: dict[str, Any]) -> None:
    card = example["Strided"].describe()
    assert card.summary == "Keep every n-th cached prompt position and the newest ones."
    assert set(card.knobs["properties"]) == {"every", "recent"}
    assert {u.resource for u in card.resources} <= set(RESOURCES)


def test_glossary_is_fresh() -> None:
    assert asset("docs/metrics.md").read_text() == glossary.page()
    assert all(f"`{name}`" in glossary.page() for name in METRICS)


def test_catalogue_is_fresh() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "workers", "describe"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert json.loads(made) == json.loads(asset("catalog.json").read_text()), "run make catalog"


def test_readme_names_every_policy_and_workload() -> None:
    readme, catalog = (ROOT / "README.md").read_text(), Catalog.load()
    assert [c.id for c in catalog.policies if f"`{c.id}`" not in readme] == []


def test_readme_names_every_recipe() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "pareto-studio train " in readme
    assert [c.id for c in Catalog.load().recipes if c.id not in readme] == []


def test_files_named_in_the_pages_exist() -> None:
    for page in ("architecture", "contributing"):
        text = asset(f"docs/{page}.md").read_text()
        named = set(re.findall(r"`((?:app|workers|studio_state|tests|assets)/[\w/.]+)`", text))
        assert [n for n in named if "<" not in n and not (ROOT / n).exists()] == []
