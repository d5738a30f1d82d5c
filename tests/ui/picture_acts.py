"""Looking at the constructed recordings of images: a studio that holds them, and where things lie on its page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.ui import pictured
from tests.ui.conftest import start_studio, stop

Box = tuple[float, float, float, float]


def pictured_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running studio whose history holds the recordings; yields its address."""
    data = tmp_path_factory.mktemp("pictured")
    pictured.record_all(data / "spool")
    process, address = start_studio(data)
    yield address
    stop(process)


def watch(page: Page, url: str, experiment: str, theme: str = "light") -> Page:
    """An experiment in the live view."""
    page.goto(f"{url}/?__theme={theme}&e={experiment}")
    page.locator(".lr-lane").first.wait_for()
    return page


def first_item(page: Page) -> None:
    """Step back to the first of two items."""
    page.get_by_role("button", name="Previous item").click()
    expect(page.locator(".li-head h3")).to_have_text("Image tokens, item 1 of 2")


def panel(page: Page, lane: int) -> Locator:
    """What is shown of one lane's picture."""
    return page.locator(f".li-panel[data-panel='{lane}']")


def boxes(found: Locator) -> list[Box]:
    """Left, top, right, bottom of every element on the page."""
    return [
        tuple(b)
        for b in found.evaluate_all(
            "nodes => nodes.map(n => n.getBoundingClientRect()).map(b => [b.left, b.top, b.right, b.bottom])"
        )
    ]


def around(all_boxes: list[Box]) -> Box:
    """The smallest box around all of them."""
    left, top, right, bottom = zip(*all_boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)
