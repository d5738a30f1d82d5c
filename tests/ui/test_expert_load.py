"""The map of experts on a constructed recording: a row a layer, a column an expert, in words for who does not see it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from tests.ui import pictured
from tests.ui.acts import THEMES
from tests.ui.conftest import start_studio, stop
from tests.ui.experts import EXPERTS, LOADS, experts
from tests.ui.picture_acts import boxes, watch
from tests.ui.test_page import violations

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A studio whose history holds the recording."""
    data = tmp_path_factory.mktemp("experts")
    pictured.record(data / "spool", EXPERTS, experts())
    process, address = start_studio(data)
    yield address
    stop(process)


def panel(page: Page, lane: int) -> Locator:
    return page.locator(f"[data-experts='{lane}']")


def test_each_cell_is_as_strong_as_its_share(page: Page, url: str) -> None:
    watch(page, url, EXPERTS)
    page.get_by_role("button", name="Previous item").click()
    expect(page.locator(".lr-experts h3")).to_have_text("Expert load, item 1 of 2")
    canvas = panel(page, 1).locator("canvas")
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(200)
    seen = Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")
    rows = [row for row in LOADS[1] if row]
    share_of: dict[float, set[int]] = {}
    for y, row in enumerate(rows):
        for x, share in enumerate(row):
            left, top = (x + 0.25) / 8 * seen.width, (y + 0.5) / 3 * seen.height
            share_of.setdefault(share, set()).add(seen.getpixel((int(left), int(top)))[0])
    assert all(len(reds) == 1 for reds in share_of.values())  # the same share, the same colour
    strengths = [reds.pop() for _, reds in sorted(share_of.items())]
    assert strengths == sorted(strengths, reverse=True)  # more of the tokens: less of the white page
    assert len(set(strengths)) == len(strengths)


def test_the_map_in_words_and_in_a_table(page: Page, url: str) -> None:
    watch(page, url, EXPERTS)
    page.get_by_role("button", name="Previous item").click()
    sentence = "the least even is layer 3: 4 of 8 experts carry 90 % of the tokens"
    expect(panel(page, 0).get_by_role("img", name=re.compile(sentence))).to_be_visible()
    expect(panel(page, 0).locator(".li-caption")).to_contain_text(sentence)
    panel(page, 0).get_by_text("Table").click()
    rows = panel(page, 0).locator("tbody tr")
    expect(rows).to_have_count(3)
    assert [c.inner_text() for c in rows.nth(1).locator("th, td").all()] == ["3", "4 of 8", "1 (50 %)", "2"]
    page.get_by_role("button", name="Next item").click()  # the table stays open
    expect(page.locator(".lr-experts h3")).to_have_text("Expert load, item 2 of 2")
    expect(panel(page, 0).locator("tbody tr").first).to_be_visible()
    canvas = panel(page, 1).locator("canvas")
    canvas.scroll_into_view_if_needed()
    [(left, top, right, bottom)] = boxes(canvas)
    page.mouse.move(left + (right - left) * 1.5 / 8, top + (bottom - top) * 1.5 / 3)
    expect(panel(page, 1).locator(".lx-about")).to_have_text("layer 3, expert 2: 25 % of its tokens")
    page.mouse.move(left, top - 40)
    expect(panel(page, 1).locator(".lx-about")).to_have_text("layers 2 to 4, experts 1 to 8")


@pytest.mark.parametrize("theme", THEMES)
def test_axe_is_clean(page: Page, url: str, theme: str) -> None:
    watch(page, url, EXPERTS, theme)
    expect(page.locator(".lx-map")).to_have_count(2)
    page.wait_for_timeout(500)
    found = violations(page)
    assert found == [], found


def test_phone_width(browser: Browser, url: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = watch(context.new_page(), url, EXPERTS)
    expect(page.locator(".lx-map")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert all(left >= 0 and right <= 390 for left, _, right, _ in boxes(page.locator(".lx-map")))
    context.close()
