"""The grid of all pictures: its marks, its filter, choosing by keys, and pictures that are sent once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.ui import pictured
from tests.ui.conftest import start_studio, stop
from tests.ui.picture_acts import boxes, panel, pictured_studio, watch
from tests.ui.pictured import CLASSES, IMAGES, named_class, right_class

pytestmark = pytest.mark.browser
url = pytest.fixture(scope="module")(pictured_studio)


def marks(page: Page, item: int) -> str:
    return page.locator(f".lg-tile[data-item=test-{item}] .lg-marks").text_content() or ""


def test_grid_marks_filter_and_keyboard(page: Page, url: str) -> None:
    watch(page, url, CLASSES)
    tiles = page.locator(".lg-tile:visible")
    expect(tiles).to_have_count(IMAGES)
    right = [[named_class(lane, i) == right_class(i) for lane in range(2)] for i in range(IMAGES)]
    differ = [i for i in range(IMAGES) if named_class(0, i) != named_class(1, i)]
    wrong = [i for i in range(IMAGES) if not all(right[i])]
    page.locator(".lg-all").scroll_into_view_if_needed()
    for i in (0, 5, 11, 13):
        assert marks(page, i) == "".join(
            f"{'●■'[lane]}{'✓' if right[i][lane] else '✗'}{'≠' if lane and i in differ else ''}" for lane in range(2)
        )
    filters = page.get_by_role("group", name="Images shown")
    filters.get_by_role("button", name=f"wrong in some lane ({len(wrong)})").click()
    expect(tiles).to_have_count(len(wrong))
    filters.get_by_role("button", name=f"lanes differ ({len(differ)})").click()
    assert tiles.evaluate_all("nodes => nodes.map(n => n.dataset.item)") == [f"test-{i}" for i in differ]
    tiles.first.locator("button").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator(".lr-picker")).to_contain_text(f"Item {differ[1] + 1} of {IMAGES}")
    expect(tiles.nth(1).locator("button")).to_have_attribute("aria-current", "true")
    expect(tiles.nth(1).locator("button")).to_be_focused()
    expect(page.locator(".li-head h3")).to_have_text(f"Image tokens, item {differ[1] + 1} of {IMAGES}")
    filters.get_by_role("button", name="all").click()
    page.get_by_role("button", name="Next item").click()
    expect(page.locator(".lg-tile button[aria-current]")).to_have_attribute(
        "aria-label", re.compile(f"^Item {differ[1] + 2}: Baseline")
    )
    buttons = page.locator(".lg-tile button")
    assert buttons.evaluate_all("nodes => nodes.filter(n => n.tabIndex === 0).length") == 1  # one stop for the tab key
    page.locator(".lg-tile button[tabindex='0']").focus()
    page.keyboard.press("Home")
    expect(buttons.first).to_be_focused()
    page.keyboard.press("ArrowDown")
    assert boxes(page.locator(":focus"))[0][1] > boxes(buttons.first)[0][1]


def test_every_picture_is_sent_once(page: Page, url: str) -> None:
    received: list[str] = []
    page.on("websocket", lambda ws: ws.on("framereceived", lambda text: received.append(str(text))))
    watch(page, url, CLASSES)
    expect(page.locator(".lg-tile")).to_have_count(IMAGES)
    for _ in range(3):
        page.get_by_role("button", name="Previous item").click()
        page.wait_for_timeout(400)
    whole = "".join(received)
    assert [whole.count(pictured.png(pictured.small(i))) for i in range(IMAGES)] == [1] * IMAGES


def test_five_hundred_pictures_stay_fluid(page: Page, url: str, tmp_path: Path) -> None:
    pictured.record(tmp_path / "spool", CLASSES, pictured.classes(500))
    process, address = start_studio(tmp_path)
    try:
        watch(page, address, CLASSES)
        expect(page.locator(".lg-tile")).to_have_count(500)
        spent = page.evaluate(
            """async () => {
              const buttons = [...document.querySelectorAll('[data-filter]')], start = performance.now();
              for (let n = 0; n < 13; n += 1) { buttons[n % 3].click(); await new Promise(requestAnimationFrame); }
              return (performance.now() - start) / 13;
            }"""
        )
        assert spent < 500  # about 20 on a machine with little else to do
        page.locator(".lg-tile[data-item=test-0] button").click()
        expect(page.locator(".lr-picker")).to_contain_text("Item 1 of 500")
    finally:
        stop(process)


def test_by_plain_requests_too(page: Page, url: str) -> None:
    page.route_web_socket(re.compile("/live/"), lambda ws: ws.close())
    watch(page, url, CLASSES)
    expect(page.locator(".lg-tile")).to_have_count(IMAGES)
    page.locator(".lg-tile[data-item=test-3] button").click()
    expect(page.locator(".lr-picker")).to_contain_text(f"Item 4 of {IMAGES}")
    expect(panel(page, 0).locator("img")).to_have_attribute("src", re.compile("^data:image/png"))
