"""Races that draw pictures, on constructed recordings: looks on the way, two pictures under a divider, the grid, the reused steps."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from app.components.numbers import metric_quantity
from studio_state.pipeline import pack_link
from tests.ui import drawn, pictured
from tests.ui.acts import THEMES, lane_column, run, wait_status
from tests.ui.conftest import open_studio, start_studio, stop
from tests.ui.drawn import DRAWN, ITEMS, LONG, NAMES, STOPPED
from tests.ui.picture_acts import boxes, watch
from tests.ui.test_page import violations

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A studio whose history holds the recordings."""
    data = tmp_path_factory.mktemp("drawn")
    drawn.record_all(data / "spool")
    process, address = start_studio(data)
    yield address
    stop(process)


def look_at(page: Page, index: int) -> Page:
    """Choose an item in the grid."""
    page.locator(f".lg-tile[data-item=picture-{index}] button").click()
    expect(page.locator(".ld-compare h3")).to_have_text(f"Side by side, item {index + 1} of {ITEMS}")
    return page


def divider(page: Page) -> Locator:
    return page.get_by_role("slider", name="Divider between the two pictures")


def address(image: Image.Image) -> str:
    return f"data:image/png;base64,{pictured.png(image)}"


def pixels(place: Locator) -> Image.Image:
    return Image.open(io.BytesIO(place.screenshot())).convert("L")


def test_the_divider_moves_by_keys(page: Page, url: str) -> None:
    look_at(watch(page, url, DRAWN), 5)
    slider, left = divider(page), page.locator(".ls-left")
    expect(slider).to_have_value("50")
    slider.focus()
    for key, value in (
        ("ArrowRight", 51),
        ("ArrowUp", 52),
        ("ArrowLeft", 51),
        ("PageUp", 61),
        ("Shift+ArrowLeft", 51),
        ("PageDown", 41),
    ):
        page.keyboard.press(key)
        expect(slider).to_have_value(str(value))
        assert left.evaluate("n => n.style.clipPath") == f"inset(0px {100 - value}% 0px 0px)"
        assert page.locator(".ls-line").evaluate("n => n.style.left") == f"{value}%"
    expect(slider).to_have_attribute("aria-valuetext", f"41 % Baseline, 59 % {NAMES[1]}")
    page.keyboard.press("Home")
    expect(slider).to_have_value("0")
    page.keyboard.press("ArrowLeft")
    expect(slider).to_have_value("0")
    page.keyboard.press("End")
    expect(slider).to_have_value("100")
    assert left.evaluate("n => n.style.clipPath") == "inset(0px 0% 0px 0px)"


def test_each_side_of_the_divider_shows_its_own_picture(page: Page, url: str) -> None:
    look_at(watch(page, url, DRAWN), 5)
    stage = page.locator(".ls-stage")
    expect(page.locator(".ls-left")).to_have_attribute("src", address(drawn.picture(0, 5)))
    expect(page.locator(".ls-right")).to_have_attribute("src", address(drawn.picture(2, 5)))
    for value in (20, 80):
        divider(page).fill(str(value))
        seen = pixels(stage)
        for x, y in ((2, 14), (9, 12), (10, 20), (17, 15), (24, 12), (25, 22)):
            share = (x + 0.5) / 28
            if abs(share - value / 100) < 0.06 or abs(y - 14) < 2:  # under the line or its grip
                continue
            right = drawn.picture(0 if share < value / 100 else 2, 5).getpixel((x, y))
            assert seen.getpixel((int(share * seen.width), int((y + 0.5) / 28 * seen.height))) == pytest.approx(right, abs=2)


def test_the_divider_is_dragged_and_touched(page: Page, browser: Browser, url: str) -> None:
    look_at(watch(page, url, DRAWN), 1)
    page.locator(".ls-stage").scroll_into_view_if_needed()
    [(left, top, right, bottom)] = boxes(page.locator(".ls-stage"))
    middle = (top + bottom) / 2
    page.mouse.move(left + (right - left) * 0.5, middle)
    page.mouse.down()
    page.mouse.move(left + (right - left) * 0.25, middle, steps=5)
    page.mouse.up()
    assert float(divider(page).input_value()) == pytest.approx(25, abs=1)
    page.mouse.move(left + (right - left) * 0.9, middle)  # the button is up: nothing follows
    assert float(divider(page).input_value()) == pytest.approx(25, abs=1)
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    phone = watch(context.new_page(), url, DRAWN)
    phone.locator(".ls-stage").scroll_into_view_if_needed()
    phone.wait_for_timeout(300)
    [(left, top, right, bottom)] = boxes(phone.locator(".ls-stage"))
    phone.touchscreen.tap(left + (right - left) * 0.7, (top + bottom) / 2)
    assert float(divider(phone).input_value()) == pytest.approx(70, abs=1)
    context.close()


def test_the_lanes_on_both_sides_are_chosen(page: Page, url: str) -> None:
    look_at(watch(page, url, DRAWN), 5)
    left, right = page.get_by_label("Picture on the left"), page.get_by_label("Picture on the right")
    expect(left).to_have_value("0")
    expect(right).to_have_value("2")
    told = page.locator(".ls-told")
    away = {
        lane: f"{NAMES[lane - 1]}: PSNR {metric_quantity('psnr', drawn.psnr(lane, 5))}, SSIM {metric_quantity('ssim', drawn.ssim(lane, 5))}"
        for lane in (1, 2)
    }
    expect(told).to_have_text(away[2])
    right.select_option("1")
    expect(told).to_have_text(away[1])
    expect(page.locator(".ls-right")).to_have_attribute("src", address(drawn.picture(1, 5)))
    left.select_option("2")
    expect(told).to_have_text(f"{away[2]} (to the baseline) · {away[1]} (to the baseline)")
    left.select_option("1")  # it stood on the right: they change places
    expect(right).to_have_value("2")
    expect(page.locator(".ls-left")).to_have_attribute("src", address(drawn.picture(1, 5)))
    look_at(page, 4)  # the choice stays
    expect(left).to_have_value("1")
    expect(told).to_contain_text(f"{NAMES[0]}: equal to the baseline's")


def test_the_grid_holds_the_recorded_distances_and_what_the_judge_saw(page: Page, url: str) -> None:
    watch(page, url, DRAWN)
    expect(page.locator(".lg-tile")).to_have_count(ITEMS)
    for index in range(ITEMS):
        tile = page.locator(f".lg-tile[data-item=picture-{index}]")
        expect(tile.locator(".lg-asked")).to_have_text(f"{index + 1}{drawn.right_class(index)}")
        for lane in range(3):
            cell = tile.locator(f".lg-cell[data-lane='{lane}']")
            away, right = drawn.psnr(lane, index), drawn.said(lane, index) == drawn.right_class(index)
            text = (
                f"{metric_quantity('psnr', away)} · {metric_quantity('ssim', drawn.ssim(lane, index))}"
                if away is not None
                else "equal"
            )
            expect(cell.locator(".lg-away")).to_have_text(text if lane else "")
            expect(cell.locator(".lg-sees")).to_have_text(
                f"{'●■▲'[lane]}{'✓' if right else '✗'}{'' if right else '≠'} {drawn.said(lane, index)}"
            )
            expect(cell.locator("img")).to_have_attribute("src", address(drawn.picture(lane, index)))
    wrong = [i for i in range(ITEMS) if drawn.said(2, i) != drawn.right_class(i)]
    assert wrong
    page.get_by_role("button", name=f"wrong in some lane ({len(wrong)})").click()
    expect(page.locator(".lg-tile:visible")).to_have_count(len(wrong))
    page.get_by_role("button", name="all (").click()
    page.get_by_role("button", name="farthest first").click()
    order = sorted(range(ITEMS), key=lambda i: min(drawn.ssim(lane, i) for lane in (1, 2)))
    assert page.locator(".lg-tile").evaluate_all("nodes => nodes.map(n => n.dataset.item)") == [f"picture-{i}" for i in order]
    page.locator(".lg-tile button[tabindex='0']").focus()
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    expect(page.locator(".lr-picker")).to_contain_text(f"Item {order[-1] + 1} of {ITEMS}")
    expect(page.locator(".lg-tile button[aria-current]")).to_have_attribute("aria-label", re.compile(f"^Item {order[-1] + 1}, "))


def test_the_steps_that_reused_work(page: Page, url: str) -> None:
    look_at(watch(page, url, DRAWN), 2)
    expect(page.locator(".ld-trace")).to_have_count(1)
    trace = page.locator(".ld-lanes li[data-lane='1'] .ld-trace")
    expect(trace).to_contain_text("13 of 20 steps reused work, 87 % of it")
    cells = trace.locator(".ld-cell")
    expect(cells).to_have_count(20)
    assert [float(c.get_attribute("data-reused") or -1) for c in cells.all()] == drawn.REUSED
    assert cells.nth(1).locator("title").text_content() == "step 2: 87 % reused"
    assert cells.nth(3).locator("title").text_content() == "step 4: computed"
    expect(
        trace.get_by_role("img", name=re.compile(r"^Denoising steps, lane A: step 1 computed, steps 2 to 3 reused 87 %, step 4"))
    ).to_be_visible()
    [cell, computed] = (boxes(cells.nth(1).locator(f".ld-{name}"))[0] for name in ("reused", "computed"))
    assert (computed[3] - computed[1]) / (cell[3] - cell[1]) == pytest.approx(0.13, abs=0.02)
    watch(page, url, STOPPED)
    expect(page.locator(".ld-compare")).to_be_visible()
    expect(page.locator(".ld-trace")).to_have_count(0)


def test_small_pictures_are_enlarged_by_whole_pixels(page: Page, url: str) -> None:
    watch(page, url, DRAWN)
    for image in (page.locator(".ld-stage img").first, page.locator(".ls-left"), page.locator(".lg-cell img").first):
        expect(image).to_have_class(re.compile("li-coarse"))
        assert image.evaluate("n => getComputedStyle(n).imageRendering") == "pixelated"
        [(left, _, right, _)] = boxes(image)
        assert (right - left) / 28 == pytest.approx(round((right - left) / 28), abs=0.01)
        assert right - left >= 56
    watch(page, url, STOPPED)
    page.get_by_role("button", name="Previous item").click()
    expect(page.locator(".ld-stage img").first).to_have_attribute("src", address(drawn.wide(0, 0)))
    expect(page.locator(".ld-stage img").first).not_to_have_class(re.compile("li-coarse"))
    [(left, top, right, bottom)] = boxes(page.locator(".ls-stage"))
    assert (right - left) / (bottom - top) == pytest.approx(192 / 128, abs=0.02)
    assert right <= boxes(page.locator(".ld-lanes"))[0][0]  # long names push nothing over the list beside it
    assert boxes(page.get_by_label("Picture on the right"))[0][2] <= boxes(page.locator(".ls-swipe"))[0][2] + 0.5


def test_a_picture_that_was_never_finished_says_so(page: Page, url: str) -> None:
    watch(page, url, STOPPED)
    column = lane_column(page, 1)
    expect(column.locator(".ld-told")).to_have_text("stopped at step 7 of 20")
    expect(column.get_by_role("img", name=f"Unfinished picture, stopped at step 7 of 20, {LONG}")).to_be_visible()
    expect(page.locator(".li-question p")).to_have_text(drawn.TEXT)
    expect(page.locator(".ld-compare h3")).to_have_text("Side by side, item 1 of 3")  # the one that both have drawn
    for name in ("all", "wrong in some lane", "lanes differ"):  # nobody judges these pictures
        expect(page.get_by_role("button", name=name)).to_be_hidden()


def lanes_link(url: str, **options: int) -> str:
    """The page with a model that draws and one lane of its own."""
    lane = {"name": NAMES[0], "steps": [{"policy": "step-cache", "knobs": {"every": 3}}]}
    state = {
        "model": "clothes-diffusion",
        "workload": "generate-images",
        "options": options,
        "settings": {},
        "device": "cpu",
        "lanes": [lane],
    }
    return f"{url}/?p={pack_link(state)}"


def test_looks_on_the_way_and_then_the_picture(page: Page, another_studio: Callable[..., str]) -> None:
    received: list[str] = []
    page.on("websocket", lambda ws: ws.on("framereceived", lambda text: received.append(str(text))))
    open_studio(page, lanes_link(another_studio(step_s=0.25), items=2))
    run(page)
    told, image = lane_column(page, 0).locator(".ld-told"), lane_column(page, 0).locator(".ld-stage img")
    expect(told).to_have_text(re.compile(r"^step \d+ of 20$"))
    first = image.get_attribute("src")
    assert first in {address(drawn.look(0, 0, step, 20)) for step in range(2, 20, 2)}
    expect(lane_column(page, 1).locator(".ld-told")).to_have_text("not begun")
    expect(image).not_to_have_attribute("src", str(first))
    expect(told).to_have_text("✓ right: sees T-shirt/top (87 %)")
    expect(image).to_have_attribute("src", address(drawn.picture(0, 0)))
    wait_status(page, "finished")
    expect(lane_column(page, 1).locator(".ld-told")).to_have_text(re.compile("^✓ right"))
    whole = "".join(received)
    looks = [pictured.png(drawn.look(lane, index, step, 20)) for lane in (0, 1) for index in (0, 1) for step in range(2, 20, 2)]
    assert max(whole.count(look) for look in looks) <= 2  # those of item 0 are the same in both lanes
    assert sum(whole.count(look) > 0 for look in looks) > 5
    assert whole.count(pictured.png(drawn.picture(1, 1))) == 1


def test_a_model_that_draws_brings_its_workload(page: Page, studio_url: str) -> None:
    open_studio(page, studio_url)
    page.locator("#model input").fill("clothes-diffusion")
    page.locator("#model input").press("Enter")
    expect(page.locator("#workload input")).to_have_value("Generate images")
    expect(page.locator("#model-facts")).to_contain_text("diffusion, dit")
    page.get_by_role("button", name="Workload options").click()
    box = page.get_by_label("prompts")
    assert box.evaluate("n => n.tagName") == "TEXTAREA"
    box.fill("Coat\nDress")
    expect(page.get_by_label("steps", exact=True)).to_have_value("20")
    expect(page.locator(".pe-card", has_text="Step cache").get_by_role("button", name="Add")).to_be_enabled()


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("experiment", [DRAWN, STOPPED])
def test_axe_is_clean(page: Page, url: str, experiment: str, theme: str) -> None:
    watch(page, url, experiment, theme)
    expect(page.locator(".lg-all")).to_be_visible()
    expect(page.locator(".ld-compare")).to_be_visible()
    page.wait_for_timeout(500)
    found = violations(page)
    assert found == [], found


@pytest.mark.parametrize("experiment", [DRAWN, STOPPED])
def test_phone_width(browser: Browser, url: str, experiment: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = watch(context.new_page(), url, experiment)
    expect(page.locator(".ld-compare")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    inside = page.evaluate(
        "[...document.querySelectorAll('.ls-told, .lr-legend, .lr-summary, .ld-lanes h4')].map((n) => [n.className, n.scrollWidth - n.clientWidth])"
    )
    assert [name for name, over in inside if over > 0] == []
    for name in (".ls-stage", ".ls-sides select", ".ld-trace", ".ld-stage", ".lg-tile"):
        assert all(left >= 0 and right <= 390 for left, _, right, _ in boxes(page.locator(name))), name
    columns = boxes(page.locator(".lr-lane"))
    assert all(b[1] >= a[3] for a, b in pairwise(columns))
    context.close()
