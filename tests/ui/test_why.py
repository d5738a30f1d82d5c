"""Why not faster, on a constructed recording: bars as long as times, sentences, the roofline, in words and by keyboard."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.ui import pictured
from tests.ui.acts import THEMES
from tests.ui.conftest import start_studio, stop
from tests.ui.explained import EXPLAINED, explained
from tests.ui.picture_acts import watch
from tests.ui.test_page import violations

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A studio whose history holds the recording."""
    data = tmp_path_factory.mktemp("explained")
    pictured.record(data / "spool", EXPLAINED, explained())
    process, address = start_studio(data)
    yield address
    stop(process)


def test_bars_are_as_long_as_the_times_and_the_lane_says_why(page: Page, url: str) -> None:
    watch(page, url, EXPLAINED)
    expect(page.locator(".lr-why h4")).to_have_text("One decode step")
    bars = page.locator(".lw-bar")
    base, lane = (bars.nth(i).bounding_box() for i in range(2))
    assert base is not None
    assert lane is not None
    assert lane["width"] / base["width"] == pytest.approx(0.8, abs=0.01)
    parts = bars.nth(1).locator(".lw-part")
    widths = [parts.nth(i).bounding_box()["width"] for i in range(parts.count())]  # type: ignore[index]
    assert [w / sum(widths) for w in widths] == pytest.approx([0.25, 0.5, 0.125, 0.125], abs=0.01)
    expect(bars.nth(1)).to_have_attribute(
        "aria-label", re.compile("linear maps 25 %, unpacking and rounding in replaced maps 50 %")
    )
    said = page.locator("[data-why-lane='1'] li")
    expect(said.nth(0)).to_contain_text("can touch linear maps: 80 % of the reference's step")
    expect(said.nth(2)).to_have_text("By bytes and operations alone it would be 2.50x as fast (estimated); it is 1.25x.")
    assert page.locator("[data-why-lane='0'] li").count() == 0


def test_the_roofline_in_words_and_in_a_table_by_keyboard(page: Page, url: str) -> None:
    watch(page, url, EXPLAINED)
    picture = page.locator(".lw-roofline svg")
    expect(picture).to_have_attribute(
        "aria-label", re.compile("left of 10.0 operations a byte memory is the limit.*0.250 operations a byte")
    )
    assert picture.locator(".lr-point").count() == 2
    summary = page.locator("[data-why='decode-roof'] summary")
    summary.focus()
    page.keyboard.press("Enter")
    row = page.locator("[data-why='decode-roof'] tbody tr").first
    expect(row).to_have_text(re.compile("linear maps\\s*0.250\\s*1.25\\s*2.50\\s*4.00 ms"))


def test_the_limits_of_a_published_device_by_keyboard(page: Page, url: str) -> None:
    watch(page, url, EXPLAINED)
    choice = page.get_by_label("Limits of")
    expect(choice.locator("option").first).to_have_text("A machine, this one")
    said = page.locator(".lw-roofline .lr-summary")
    expect(said).to_contain_text("measured here in passing on 2 threads; `pareto-studio calibrate` measures longer")
    choice.select_option("t4")
    expect(said).to_contain_text("NVIDIA T4: 320 GB/s and 8,100 billion float32 operations a second, published (NVIDIA T4")
    expect(said).to_contain_text("Nothing ran on it")
    expect(choice).to_be_focused()
    row = page.locator("[data-why='decode-roof'] tbody tr").first
    expect(row).to_have_text(re.compile("linear maps\\s*0.250\\s*–\\s*80.0\\s*125 µs"))


@pytest.mark.parametrize("scheme", THEMES)
@pytest.mark.parametrize("width", [1280, 375])
def test_everyone_can_read_it(browser: Browser, url: str, scheme: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    watch(page, url, EXPLAINED, scheme)
    page.locator(".lr-why").scroll_into_view_if_needed()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert violations(page) == []
    page.close()
