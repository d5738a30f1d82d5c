"""The cache under the microscope on constructed recordings: layers, heads and positions over time, in pixels and in words."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from tests.ui import cached
from tests.ui.acts import THEMES
from tests.ui.cached import FIRST, HEADS, LONG, NEEDLE, SEEN, WORDS
from tests.ui.conftest import start_studio, stop
from tests.ui.picture_acts import around, boxes, watch
from tests.ui.pictured import QUARTER, TOKENS
from tests.ui.test_page import violations

pytestmark = pytest.mark.browser

ROWS = [(layer, head) for layer, heads in enumerate(HEADS) for head in range(heads)]
WHOLE_NEEDLE = "no token of it is gone from every head"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A studio whose history holds the recordings."""
    data = tmp_path_factory.mktemp("cached")
    cached.record_all(data / "spool")
    process, address = start_studio(data)
    yield address
    stop(process)


def scope(page: Page) -> Locator:
    return page.locator(".lr-cache")


def stage(page: Page) -> Locator:
    return scope(page).get_by_role("application", name=re.compile("^Cache of "))


def moment(page: Page) -> Locator:
    return scope(page).get_by_role("slider", name=re.compile("^Moment, "))


def about(page: Page) -> Locator:
    return scope(page).locator(".lc-about")


def needle(page: Page) -> Locator:
    return scope(page).locator(".lc-needle")


def held(page: Page) -> list[list[int]]:
    """What the map shows: per row the columns whose middle is coloured, read from its pixels."""
    found: list[list[int]] = page.locator(".lc-map").evaluate(
        """(map, heads) => {
          const pen = map.getContext('2d'), rows = heads.reduce((a, b) => a + b), gaps = heads.length - 1;
          const high = (map.height - gaps) / rows, of = heads.flatMap((n, layer) => Array(n).fill(layer));
          return of.map((layer, row) => Array.from({length: map.width}, (_, x) => x)
            .filter((x) => pen.getImageData(x, Math.floor(row * high + layer), 1, 1).data[3] > 0));
        }""",
        HEADS,
    )
    return found


def tab_to(page: Page, wanted: Locator, most: int = 80) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if wanted.evaluate("node => node === document.activeElement"):
            return
    raise AssertionError(f"{wanted} is not reached by Tab")


def luminance(colour: tuple[int, int, int]) -> float:
    """Relative luminance as WCAG defines it."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_row_and_column_is_as_recorded_at_every_moment(page: Page, url: str) -> None:
    watch(page, url, NEEDLE)
    expect(scope(page).locator("h3")).to_have_text("Cache under the microscope, item 1 of 1")
    expect(moment(page)).to_have_attribute("aria-valuetext", "after 8 new tokens")
    ends = [0, 1, *range(16, 20)]
    wanted = {
        0: ("after the prompt", 20, [sorted([*ends, *own]) for own in ((8, 9), (8,), (8,), (), (5, 6))]),
        1: ("after 4 new tokens", 23, [sorted([*ends, *own, 20, 21, 22]) for own in ((8,), (), (), (), ())]),
        2: ("after 8 new tokens", 27, [[*ends, *range(20, 27)]] * 5),
    }
    for at, (when, positions, rows) in wanted.items():
        moment(page).fill(str(at))
        expect(about(page)).to_have_text(f"{when}: 5 heads of 3 layers, {positions} positions")
        expect(moment(page)).to_have_attribute("aria-valuetext", when)
        assert held(page) == rows
    scope(page).get_by_text("Table", exact=True).click()
    cells = [[c.inner_text() for c in row.locator("th, td").all()] for row in scope(page).locator("tbody tr").all()]
    assert cells == [[str(layer), "48 %", "0 %"] for layer in (1, 2, 3)]  # 13 of 27
    expect(scope(page).locator(".lc-layers span")).to_have_text(["1", "2", "3"])


def test_the_needle_is_marked_and_said_when_lost(page: Page, url: str) -> None:
    watch(page, url, NEEDLE)
    expect(scope(page).locator(".lr-summary")).to_contain_text(
        "The needle, “47 11”, is tokens 9 to 10: 0 of 5 heads hold all of it, 2 of its 2 tokens are gone from every head, "
        "first after 4 new tokens; the answer is wrong."
    )
    mark = scope(page).locator(".lc-marked")
    (left, _, right, _), (start, _, stop, _) = boxes(stage(page).locator("canvas"))[0], boxes(mark)[0]
    assert (start, stop) == pytest.approx((left + (right - left) * 8 / 27, left + (right - left) * 10 / 27), abs=1.5)
    said = {
        "0": f"Needle after the prompt: 1 of 5 heads hold all of it, {WHOLE_NEEDLE}.",
        "1": "Needle lost after 4 new tokens: 0 of 5 heads hold all of it, 1 of its 2 tokens is gone from every head.",
        "2": "Needle lost after 8 new tokens: 0 of 5 heads hold all of it, 2 of its 2 tokens are gone from every head.",
    }
    for at, text in said.items():
        moment(page).fill(at)
        expect(needle(page)).to_have_text(text)
        assert mark.evaluate("m => getComputedStyle(m).borderLeftStyle") == ("solid" if at == "0" else "dashed")
    scope(page).get_by_role("button", name="Heavy hitters").click()
    expect(scope(page).locator(".lr-summary")).to_contain_text(
        f"3 of 5 heads hold all of it, {WHOLE_NEEDLE}; the answer is right."
    )
    expect(needle(page)).to_have_text(f"Needle after 8 new tokens: 3 of 5 heads hold all of it, {WHOLE_NEEDLE}.")
    assert mark.evaluate("m => getComputedStyle(m).borderLeftStyle") == "solid"


def test_what_the_pointer_is_over_is_said(page: Page, url: str) -> None:
    watch(page, url, NEEDLE)
    moment(page).fill("0")
    canvas = stage(page).locator("canvas")
    canvas.scroll_into_view_if_needed()
    [(left, top, right, bottom)] = boxes(canvas)

    def point(row: int, column: int) -> None:
        page.mouse.move(left + (right - left) * (column + 0.5) / 27, top + (bottom - top) * (row + 0.5) / 5)

    for row, column, state in ((0, 9, "held"), (1, 9, "gone"), (2, 8, "held"), (4, 8, "gone")):
        layer, head = ROWS[row]
        point(row, column)
        expect(about(page)).to_have_text(f"layer {layer + 1}, head {head + 1}, position {column + 1} “{WORDS[column]}”: {state}")
    point(3, 22)
    expect(about(page)).to_have_text("layer 3, head 1, position 23, generated: not yet there")
    page.mouse.move(left, top - 60)
    expect(about(page)).to_have_text("after the prompt: 5 heads of 3 layers, 20 positions")
    expect(scope(page).locator(".lc-cross:visible")).to_have_count(0)


def test_by_keyboard_alone(page: Page, url: str) -> None:
    watch(page, url, NEEDLE)
    expect(stage(page)).to_be_visible()
    page.locator(".lr-cache").evaluate("place => { place.tabIndex = -1; place.focus(); place.removeAttribute('tabindex'); }")
    lanes = scope(page).get_by_role("group", name="Lane under the microscope")
    tab_to(page, lanes.get_by_role("button", name="Half the cache"), 1)
    tab_to(page, lanes.get_by_role("button", name="Heavy hitters"), 1)
    page.keyboard.press("Enter")
    expect(lanes.get_by_role("button", name="Heavy hitters")).to_have_attribute("aria-pressed", "true")
    expect(lanes.get_by_role("button", name="Heavy hitters")).to_be_focused()  # it was drawn anew
    tab_to(page, moment(page), 1)
    page.keyboard.press("Home")
    expect(moment(page)).to_have_attribute("aria-valuetext", "after the prompt")
    page.keyboard.press("ArrowRight")
    expect(moment(page)).to_have_attribute("aria-valuetext", "after 4 new tokens")
    tab_to(page, stage(page), 1)
    assert stage(page).evaluate("s => getComputedStyle(s).outlineStyle") == "solid"
    for key, words in (
        ("ArrowRight", "layer 1, head 1, position 9 “47”: held"),  # it begins at the needle
        ("ArrowDown", "layer 1, head 2, position 9 “47”: held"),
        ("PageDown", "layer 3, head 2, position 9 “47”: gone"),
        ("ArrowLeft", "layer 3, head 2, position 8 “is”: gone"),
        ("End", "layer 3, head 2, position 27, generated: not yet there"),
        ("Home", "layer 3, head 2, position 1 “The”: held"),
        ("PageUp", "layer 1, head 1, position 1 “The”: held"),
        ("ArrowUp", "layer 1, head 1, position 1 “The”: held"),
        ("Escape", "after 4 new tokens: 5 heads of 3 layers, 23 positions"),
    ):
        page.keyboard.press(key)
        expect(about(page)).to_have_text(words)
    tab_to(page, scope(page).locator("summary"), 1)
    page.keyboard.press("Enter")
    tab_to(page, scope(page).get_by_role("region", name="Table of the cache of Heavy hitters"), 1)
    lanes.get_by_role("button", name="Half the cache").press("Enter")  # table and moment stay with the item
    expect(scope(page).locator("details")).to_have_attribute("open", "")
    expect(moment(page)).to_have_value("1")
    page.keyboard.press("Shift+Tab")
    assert not scope(page).evaluate("s => s.contains(document.activeElement)")  # nobody is caught inside


def cells(page: Page) -> dict[int, float]:
    """Patch -> share of the heads that hold it, of the patches in view."""
    found = (
        scope(page)
        .locator(".li-cell")
        .evaluate_all("nodes => nodes.map(n => [n.dataset.patch, n.dataset.held, n.style.display])")
    )
    return {int(patch): float(share) for patch, share, _ in found}


def test_dropped_patches_lie_on_the_image(page: Page, url: str) -> None:
    watch(page, url, SEEN)
    page.get_by_role("button", name="Previous item").click()
    expect(scope(page).locator("h3")).to_have_text("Cache under the microscope, item 1 of 2")
    expect(scope(page).locator(".li-caption")).to_have_text(
        "patches of the image: 63 % held, mean of all heads; none of 144 is gone from every head"  # all in one head, a quarter in the other
    )
    assert cells(page) == {i: 1.0 if i in QUARTER else 0.5 for i in range(TOKENS)}
    picture = scope(page).locator(".li-stage img")
    assert picture.evaluate("img => img.naturalWidth") == 360
    left, top, right, bottom = boxes(picture)[0]
    dimmed = scope(page).locator(".li-cell:visible")
    expect(dimmed).to_have_count(TOKENS - len(QUARTER))
    assert around(boxes(dimmed)) == pytest.approx((left, top, right, bottom), abs=1.0)
    stage(page).focus()
    page.keyboard.press("ArrowDown")
    expect(scope(page).locator(".li-caption")).to_have_text("layer 1, head 1 holds 144 of 144 patches of the image")
    expect(dimmed).to_have_count(0)
    page.keyboard.press("ArrowDown")
    expect(
        scope(page).get_by_role("img", name="A quarter of the cache: layer 2, head 1 holds 36 of 144 patches of the image")
    ).to_be_visible()
    expect(dimmed).to_have_count(TOKENS - len(QUARTER))
    page.mouse.move(0, 0)
    shot = Image.open(io.BytesIO(scope(page).locator(".li-stage").screenshot())).convert("L")
    bright = shot.crop((shot.width * 11 // 20, shot.height // 20, shot.width * 19 // 20, shot.height * 9 // 20))
    low, high = bright.getextrema()
    assert (low, high) == (
        Image.new("RGB", (1, 1), (250, 220, 60)).convert("L").getpixel((0, 0)),
    ) * 2  # nothing over what is held
    dark = shot.crop((shot.width // 10, shot.height * 6 // 10, shot.width * 4 // 10, shot.height * 9 // 10)).getextrema()
    assert dark[1] - dark[0] > 60  # hatched: seen without colour
    page.keyboard.press("End")
    expect(about(page)).to_have_text(re.compile(rf"position {FIRST + TOKENS + 6 + 5}, generated: held"))


def test_whole_image_and_tiles_are_shown_apart(page: Page, url: str) -> None:
    watch(page, url, SEEN)
    expect(scope(page).locator("h3")).to_have_text("Cache under the microscope, item 2 of 2")
    switch = scope(page).get_by_role("group", name="Part of the image in the cache")
    caption = scope(page).locator(".li-caption")
    expect(switch.get_by_role("button", name="whole image")).to_have_attribute("aria-pressed", "true")
    expect(caption).to_have_text("patches of the whole image: 0 % held, mean of all heads; 16 of 16 gone from every head")
    expect(scope(page).locator(".li-cell:visible")).to_have_count(16)
    switch.get_by_role("button", name="tiles").focus()
    page.keyboard.press("Enter")
    expect(switch.get_by_role("button", name="tiles")).to_be_focused()
    expect(switch.get_by_role("button", name="tiles")).to_have_attribute("aria-pressed", "true")
    expect(caption).to_have_text("patches of the tiles: 100 % held, mean of all heads; none of 64 is gone from every head")
    expect(scope(page).locator(".li-cell:visible")).to_have_count(0)
    assert scope(page).get_by_role("slider").count() == 0  # one moment, no slider
    page.get_by_role("button", name="Previous item").click()
    expect(switch).to_have_count(0)


@pytest.mark.parametrize("width", [1360, 390])
def test_where_columns_share_a_pixel_none_is_lost(page: Page, url: str, width: int) -> None:
    """Two thousand positions on fewer pixels: every fortieth is held, and every one of them leaves a trace in the first row and in the last."""
    page.set_viewport_size({"width": width, "height": 900})
    watch(page, url, LONG)
    expect(stage(page)).to_be_visible()
    page.wait_for_function("() => document.querySelector('.lc-map').width < 2000")
    marks = page.locator(".lc-map").evaluate(
        """map => {
          const pen = map.getContext('2d'), seen = (x, y) => pen.getImageData(x, y, 1, 1).data[3] > 0, columns = Array.from({length: map.width}, (_, x) => x);
          return [1, map.height - 2].map((y) => columns.filter((x) => seen(x, y) && (x === 0 || !seen(x - 1, y))).length);
        }"""
    )
    assert marks == [50, 50]
    expect(scope(page).locator(".lc-layers span")).to_have_text(["1", "6", "11", "16", "21", "26"])


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("experiment", [NEEDLE, SEEN])
def test_axe_is_clean(page: Page, url: str, experiment: str, theme: str) -> None:
    watch(page, url, experiment, theme)
    expect(stage(page)).to_be_visible()
    scope(page).get_by_text("Table", exact=True).click()
    stage(page).focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(500)
    found = violations(page)
    assert found == [], found


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_held_and_gone_can_be_told_apart(page: Page, url: str, theme: str) -> None:
    """By brightness alone, in both themes, and also after the theme changed under the map."""
    watch(page, url, NEEDLE, theme)
    canvas = stage(page).locator("canvas")
    for _ in range(2):
        canvas.scroll_into_view_if_needed()
        page.wait_for_timeout(200)
        shot = Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")
        kept, gone = (luminance(shot.getpixel((round((x + 0.5) / 27 * shot.width), shot.height // 11))) for x in (17, 4))
        assert (max(kept, gone) + 0.05) / (min(kept, gone) + 0.05) >= 3  # WCAG 2.2, 1.4.11
        page.evaluate("document.body.classList.toggle('dark')")


@pytest.mark.parametrize("experiment", [NEEDLE, SEEN, LONG])
def test_phone_width(browser: Browser, url: str, experiment: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = watch(context.new_page(), url, experiment)
    expect(stage(page)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    places = boxes(scope(page).locator(".lc-stage, .lc-about, .li-stage, .li-caption"))
    assert len(places) == (4 if experiment == SEEN else 2)
    assert all(left >= 0 and right <= 390 for left, _, right, _ in places)
    assert all(b[1] >= a[3] for a, b in pairwise(places))  # one below the other
    stage(page).tap(position={"x": 5, "y": 5})
    expect(about(page)).to_have_text(re.compile(r"^layer 1, head \d, position "))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()
