"""Experiments on images, on constructed recordings whose content is known: what is on screen must lie where it lies in the image."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from tests.ui import pictured
from tests.ui.acts import THEMES
from tests.ui.picture_acts import around, boxes, first_item, panel, pictured_studio, watch
from tests.ui.pictured import CLASSES, MAPS, PLAIN, QUARTER, TOKENS, VLM, named_class, right_class
from tests.ui.test_page import violations

pytestmark = pytest.mark.browser


url = pytest.fixture(scope="module")(pictured_studio)


@pytest.fixture
def square(page: Page, url: str) -> Page:
    """The item with the bright square."""
    first_item(watch(page, url, VLM))
    return page


def pixels(stage: Locator) -> Image.Image:
    return Image.open(io.BytesIO(stage.screenshot())).convert("RGB")


def mean(image: Image.Image, left: float, top: float, right: float, bottom: float) -> float:
    """Mean brightness of a part given in shares of the image."""
    w, h = image.size
    grey = image.crop((int(left * w), int(top * h), int(right * w), int(bottom * h))).convert("L")
    return sum(v * n for v, n in enumerate(grey.histogram())) / (grey.width * grey.height)


def clear(page: Page, lane: int) -> Locator:
    return panel(page, lane).locator(".li-cell[data-kept='1']:visible")


def test_the_clear_tokens_lie_over_the_top_right_quarter(square: Page) -> None:
    expect(clear(square, 1)).to_have_count(len(QUARTER))
    assert sorted(int(c.get_attribute("data-token") or -1) for c in clear(square, 1).all()) == QUARTER
    left, top, right, bottom = boxes(panel(square, 1).locator(".li-stage img"))[0]
    found = around(boxes(clear(square, 1)))
    assert found == pytest.approx(((left + right) / 2, top, right, (top + bottom) / 2), abs=1.0)
    everywhere = around(boxes(panel(square, 1).locator(".li-cell")))
    assert everywhere == pytest.approx((left, top, right, bottom), abs=1.0)
    expect(panel(square, 1).get_by_role("img", name="A quarter of the tokens: 36 of 144 image tokens kept")).to_be_visible()


def test_clear_is_as_it_was_and_dropped_is_dark_and_hatched(square: Page) -> None:
    base, lane, half = (pixels(panel(square, i).locator(".li-stage")) for i in (0, 1, 3))
    inside, outside = (0.55, 0.05, 0.95, 0.45), (0.05, 0.55, 0.95, 0.95)
    assert mean(lane, *inside) == pytest.approx(mean(base, *inside), abs=1)
    assert mean(half, *inside) == pytest.approx(mean(base, *inside), abs=1)
    colour = base.getpixel((base.width // 4, base.height // 2))

    def values(image: Image.Image) -> set[int]:
        w, h = image.size
        part = image.crop((w // 4, h * 2 // 3, w // 2, h * 5 // 6)).convert("L")
        return {v for v, n in enumerate(part.histogram()) if n}

    assert values(base) == {Image.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0))}  # nothing over it
    assert max(values(lane)) - min(values(lane)) > 60  # hatched: seen without colour
    assert min(values(lane)) < min(values(half)) < min(values(base))  # dropped half-way: half a veil
    assert mean(base, *outside) != mean(lane, *outside)


def test_the_slider_shows_what_another_keep_would_leave(square: Page) -> None:
    level = pictured.ranked(QUARTER, TOKENS)
    slider = panel(square, 1).get_by_role("slider", name="keep, A quarter of the tokens")
    expect(slider).to_have_value("25")
    expect(panel(square, 1).locator(".li-what")).to_have_text("as in the run: keep 25 %")
    for k in (5, 35, 60, 100):
        slider.fill(str(k))
        left = sum(v <= k / 100 for v in level)
        expect(clear(square, 1)).to_have_count(left)
        expect(panel(square, 1).locator(".li-caption")).to_have_text(f"{left} of 144 image tokens would be kept")
        expect(panel(square, 1).locator(".li-what")).to_have_text(
            f"what this policy would keep at {k} %; the run itself kept 25 %"
        )
        expect(slider).to_have_attribute("aria-valuetext", f"{k} %")
    slider.press("ArrowLeft")
    expect(slider).to_have_value("99")
    square.get_by_role("button", name="keep as in the run, A quarter of the tokens").click()
    expect(clear(square, 1)).to_have_count(36)
    expect(slider).to_be_focused()
    assert panel(square, 0).get_by_role("slider").count() == 0  # no levels, no slider


def test_merged_tokens_share_an_outline(square: Page) -> None:
    groups = panel(square, 2).locator(".li-group")
    expect(groups).to_have_count(30)  # five rows of six squares; the top two rows of tokens stay alone
    expect(panel(square, 2).locator(".li-caption")).to_have_text("144 tokens merged into 54")
    assert set(groups.evaluate_all("nodes => nodes.map(n => n.dataset.tokens)")) == {"4"}
    left, top, right, bottom = boxes(panel(square, 2).locator(".li-stage img"))[0]
    found = boxes(panel(square, 2).locator(".li-tint"))
    assert found[0] == pytest.approx(
        (left, top + (bottom - top) / 6, left + (right - left) / 6, top + (bottom - top) / 3), abs=1.0
    )
    assert around(found) == pytest.approx((left, top + (bottom - top) / 6, right, bottom), abs=1.0)
    assert panel(square, 2).locator(".li-outline").first.get_attribute("d").count("M") == 8  # type: ignore[union-attr]
    expect(panel(square, 1).locator(".li-group")).to_have_count(0)


def test_whole_image_and_tiles_are_shown_apart(page: Page, url: str) -> None:
    watch(page, url, VLM)
    switch = page.get_by_role("group", name="Part of the image")
    expect(switch.get_by_role("button", name="whole image")).to_have_attribute("aria-pressed", "true")
    cells = panel(page, 1).locator(".li-cell:visible")
    expect(cells).to_have_count(16)
    expect(clear(page, 1)).to_have_count(4)
    switch.get_by_role("button", name="tiles").focus()
    page.keyboard.press("Enter")
    expect(cells).to_have_count(64)  # 65 with the line break, which has no place
    expect(clear(page, 1)).to_have_count(16)
    expect(switch.get_by_role("button", name="tiles")).to_be_focused()
    expect(panel(page, 1).get_by_role("img", name=re.compile("shown: tiles"))).to_be_visible()
    first_item(page)
    expect(switch).to_be_hidden()


def test_question_and_one_word_answers(square: Page) -> None:
    asked = square.locator(".li-question")
    expect(asked.locator("p")).to_have_text(pictured.QUESTION)
    assert asked.locator("img").evaluate("img => img.naturalWidth") == 360
    assert boxes(asked)[0][3] <= boxes(square.locator(".lr-lane"))[0][1]
    wrong = square.locator(".lr-lane[data-lane-index='2'] .lr-text")
    expect(wrong.locator("del")).to_have_text("top right")
    expect(wrong.locator("mark")).to_have_text("bottom")
    expect(wrong).to_contain_text("✗ wrong · expected: top right · differs from baseline")
    expect(square.locator(".lr-lane[data-lane-index='1'] .lr-text")).to_contain_text("✓ right · same as baseline")


def test_bars_of_classes_beside_the_picture(page: Page, url: str) -> None:
    watch(page, url, CLASSES)
    page.locator(".lg-tile[data-item=test-11] button").click()
    text = page.locator(".lr-lane[data-lane-index='1'] .lr-text")
    said, right = named_class(1, 11), right_class(11)
    assert said != right
    expect(text.locator(".li-bar")).to_have_count(5)
    expect(text.locator(".li-bar").first).to_contain_text(re.compile(re.escape(said) + r"\s*62\.4 %"))
    expect(text.locator(".li-expected")).to_have_text(re.compile(re.escape(right) + r" ◂ expected\s*\d"))
    expect(text).to_contain_text(f"✗ wrong · expected: {right} · differs from baseline")
    expect(page.locator(".lr-lane[data-lane-index='0'] .lr-text")).to_contain_text("✓ right")
    track, fill = (boxes(text.locator(f".li-bar .lr-{name}"))[0] for name in ("track", "fill"))
    assert (fill[2] - fill[0]) / (track[2] - track[0]) == pytest.approx(0.624, abs=0.01)
    assert text.locator("img").evaluate("img => img.naturalWidth") == 28
    expect(page.locator(".lr-lane[data-lane-index='1'] .lr-now")).to_contain_text("images/s")


def test_maps_stand_beside_the_picture(page: Page, url: str) -> None:
    watch(page, url, MAPS)
    expect(page.locator(".li-head h3")).to_have_text("Maps, item 1 of 1")
    for lane in range(2):
        images = panel(page, lane).locator("img")
        expect(images).to_have_count(2)
        (_, top, right, _), (left, map_top, _, _) = boxes(images)
        assert (right <= left, top) == (True, map_top)
        assert images.nth(1).evaluate("img => img.naturalWidth") == 24
    expect(page.locator(".lg-all")).to_have_count(0)  # one image is no grid


def test_nothing_of_it_without_pictures(page: Page, url: str) -> None:
    watch(page, url, PLAIN)
    expect(page.locator(".lr-lane")).to_have_count(2)
    for name in ("question", "images", "drawn", "gallery", "picker", "experts"):
        expect(page.locator(f".lr-{name}")).to_be_hidden()
    expect(page.locator(".lr-short")).to_have_count(0)
    gaps = page.evaluate(
        """() => {
          const shown = [...document.querySelector('.lr').children].filter((n) => n.offsetHeight && getComputedStyle(n).position !== 'absolute');
          return shown.slice(1).map((n, i) => Math.round(n.getBoundingClientRect().top - shown[i].getBoundingClientRect().bottom));
        }"""
    )
    assert set(gaps) == {12}


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("experiment", [VLM, CLASSES])
def test_axe_is_clean(page: Page, url: str, experiment: str, theme: str) -> None:
    watch(page, url, experiment, theme)
    expect(page.locator(".lg-all")).to_be_visible()
    if experiment == VLM:
        first_item(page)
    page.wait_for_timeout(500)
    found = violations(page)
    assert found == [], found


@pytest.mark.parametrize("experiment", [VLM, CLASSES, MAPS])
def test_phone_width(browser: Browser, url: str, experiment: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = watch(context.new_page(), url, experiment)
    expect(page.locator(".li-panel")).to_have_count(4 if experiment == VLM else 2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    places = boxes(page.locator(".li-panel"))
    assert all(b[1] >= a[3] for a, b in pairwise(places))  # one below the other
    assert all(left >= 0 and right <= 390 for left, _, right, _ in boxes(page.locator(".li-panel .li-stage")))
    context.close()
