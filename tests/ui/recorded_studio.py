"""A studio that opens on recorded experiments, and what their spools say, read as plain JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect

from tests.recorded import spools
from tests.ui.conftest import start_studio, stop


def recorded_studio(data: Path) -> Iterator[str]:
    """A running studio whose history holds the recorded experiments; yields its address."""
    spools(data / "spool")
    process, url = start_studio(data)
    yield url
    stop(process)


def lines(data: Path, experiment: str, kind: str) -> list[dict[str, Any]]:
    """The events of one kind, as they stand in the spool."""
    text = (data / "spool" / f"{experiment}.jsonl").read_text(encoding="utf-8")
    return [e for e in map(json.loads, text.splitlines()) if e["event"] == kind]


def whole(data: Path, experiment: str, lane: int, name: str) -> float:
    """The latest value of a whole lane."""
    return float(
        [e["value"] for e in lines(data, experiment, "metric") if e["item"] is None and e["lane"] == lane and e["name"] == name][
            -1
        ]
    )


def open_compare(page: Page, url: str, theme: str = "light") -> Page:
    """The compare tab with its table."""
    page.goto(f"{url}/?__theme={theme}")
    page.get_by_role("tab", name="Compare").click()
    page.locator(".ht-table, .ht .ps-empty").first.wait_for()
    return page


def group(page: Page, experiment: str) -> Locator:
    """The rows of one experiment."""
    return page.locator(f"[data-experiment='{experiment}']")


def pick(page: Page, experiment: str, lane: int | None = None) -> None:
    """Pick one lane, or all of an experiment."""
    box = group(page, experiment).locator("input[type=checkbox]").nth(0 if lane is None else lane + 1)
    box.check()


def wait_drawn(page: Page, figure: str, charts: int = 1) -> Locator:
    """A figure whose charts are drawn."""
    found = page.locator(f"#{figure}")
    expect(found.locator(".vc-plot[data-ready='1']")).to_have_count(charts, timeout=20_000)
    return found


def table(figure: Locator) -> list[list[str]]:
    """Cells of a figure's table, opened if it is folded."""
    details = figure.locator("details")
    if details.count() and not details.first.evaluate("(d) => d.open"):
        details.locator("summary").first.click()
    return [[c.strip() for c in row.locator("th, td").all_inner_texts()] for row in figure.locator("table.dt tbody tr").all()]
