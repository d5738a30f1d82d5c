"""Composing lanes: mouse, touch, keyboard, problems, forms, sweeps, saved pipelines, links."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, Page, expect

from studio_state.pipeline import pack_link
from tests.ui.acts import add, card, centre, drag, example, lane_names, lanes_in_python, seen_by_python, steps
from tests.ui.conftest import open_studio

pytestmark = pytest.mark.browser


def lane_body(page: Page, lane: int = 0):
    return page.locator("[data-lane]").nth(lane).locator("[data-steps]")


def row(page: Page, title: str):
    return page.locator(".pe-step", has_text=title).first


def test_mouse_drag_adds_orders_and_removes(studio: Page) -> None:
    drag(studio, centre(card(studio, "lean-decode")), centre(lane_body(studio)))
    drag(studio, centre(card(studio, "snapkv")), centre(lane_body(studio)))
    drag(studio, centre(card(studio, "magnitude")), centre(lane_body(studio)))
    assert steps(studio) == ["Magnitude pruning", "SnapKV", "Lean decode"]  # the stage decides, not the drop
    add(studio, "KIVI")
    assert steps(studio) == ["Magnitude pruning", "SnapKV", "KIVI", "Lean decode"]
    x, y = centre(row(studio, "SnapKV").locator(".pe-row"))
    drag(studio, centre(row(studio, "KIVI").locator("[data-act=grab]")), (x, y - 12))
    assert steps(studio) == ["Magnitude pruning", "KIVI", "SnapKV", "Lean decode"]  # within a stage, dragging orders
    x, y = centre(row(studio, "Magnitude").locator(".pe-row"))
    drag(studio, centre(row(studio, "Lean decode").locator("[data-act=grab]")), (x, y - 12))
    assert steps(studio) == ["Magnitude pruning", "KIVI", "SnapKV", "Lean decode"]
    drag(studio, centre(card(studio, "rtn")), (5, 5))
    assert len(steps(studio)) == 4
    studio.get_by_role("button", name="Remove KIVI from").click()
    expect(studio.locator(".pe-live")).to_have_text(re.compile("KIVI removed"))
    assert [[s["policy"] for s in lane] for lane in lanes_in_python(studio)] == [["magnitude", "snapkv", "lean-decode"]]


def test_drag_between_lanes_and_escape(studio: Page) -> None:
    add(studio, "SnapKV")
    studio.get_by_role("button", name="+ Add a lane").click()
    drag(studio, centre(row(studio, "SnapKV").locator(".pe-stage")), centre(lane_body(studio, 1)))
    assert (steps(studio, 0), steps(studio, 1)) == ([], ["SnapKV"])
    drag(studio, centre(card(studio, "kivi")), centre(lane_body(studio, 0)), drop=False)
    expect(studio.locator(".pe-ghost")).to_be_visible()
    studio.keyboard.press("Escape")
    expect(studio.locator(".pe-ghost")).to_have_count(0)
    studio.mouse.up()
    assert (steps(studio, 0), steps(studio, 1)) == ([], ["SnapKV"])
    drag(studio, centre(card(studio, "kivi")), centre(lane_body(studio, 0)))
    add(studio, "Lean decode")  # the click after a drag is a click
    assert steps(studio, 0) == ["KIVI", "Lean decode"]


def test_keyboard_only(studio: Page) -> None:
    live = studio.locator(".pe-live")
    for title in ("SnapKV", "KIVI"):
        studio.get_by_role("button", name=f"Add {title} to").focus()
        studio.keyboard.press("Enter")
    expect(studio.get_by_role("button", name="Move KIVI, step 2 of 2 in Lane A")).to_be_focused()
    studio.keyboard.press("Space")
    expect(live).to_have_text(re.compile("KIVI grabbed"))
    studio.keyboard.press("ArrowUp")
    expect(live).to_have_text(re.compile("moved to step 1 of 2"))
    studio.keyboard.press("Space")
    assert steps(studio) == ["KIVI", "SnapKV"]
    studio.keyboard.press("Space")
    studio.keyboard.press("ArrowDown")
    studio.keyboard.press("Escape")
    assert steps(studio) == ["KIVI", "SnapKV"]
    studio.get_by_role("button", name="+ Add a lane").press("Enter")
    studio.get_by_role("button", name="Move KIVI, step 1").focus()
    studio.keyboard.press("Alt+ArrowRight")
    expect(live).to_have_text(re.compile("moved to step 1 of 1 in Lane B"))
    assert (steps(studio, 0), steps(studio, 1)) == (["SnapKV"], ["KIVI"])
    studio.keyboard.press("Delete")
    expect(live).to_have_text(re.compile("KIVI removed from Lane B"))
    assert [[s["policy"] for s in lane] for lane in lanes_in_python(studio)] == [["snapkv"], []]


def test_touch(browser: Browser, studio_url: str) -> None:
    context = browser.new_context(has_touch=True, is_mobile=True, viewport={"width": 390, "height": 844}, device_scale_factor=2)
    page = open_studio(context.new_page(), studio_url)
    cdp = context.new_cdp_session(page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        cdp.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]})

    lane_body(page).scroll_into_view_if_needed()
    page.evaluate("document.querySelector('[data-steps]').scrollIntoView({block: 'end'})")
    (x0, y0), (x1, y1) = [(b["x"] + b["width"] / 2, b["y"] + b["height"] / 2) for b in (
        page.locator(".pe-card[data-policy=rtn] .pe-handle").bounding_box(), lane_body(page).bounding_box()) if b]  # fmt: skip
    touch("touchStart", (x0, y0))
    for i in range(1, 11):
        touch("touchMove", (x0 + (x1 - x0) * i / 10, y0 + (y1 - y0) * i / 10))
    touch("touchEnd")
    assert steps(page) == ["Round to nearest"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the phone"
    context.close()


def test_conflict_is_shown_at_its_policy_and_mended(studio: Page) -> None:
    add(studio, "SnapKV")
    add(studio, "H2O")
    problem = row(studio, "H2O").locator(".pe-problem")
    expect(problem).to_contain_text("SnapKV and H2O both decide which positions the key-value cache keeps")
    expect(row(studio, "SnapKV").locator(".pe-problem")).to_have_count(0)
    problem.get_by_role("button", name="Remove H2O").click()
    assert steps(studio) == ["SnapKV"]
    expect(studio.locator(".pe-problem")).to_have_count(0)


def test_knob_form_validates_and_mends(studio: Page) -> None:
    add(studio, "Round to nearest")
    studio.get_by_role("radio", name="8", exact=True).check()
    group = studio.get_by_role("spinbutton", name="group size")
    group.fill("112")
    expect(row(studio, "Round to nearest").locator(".pe-problem")).to_contain_text("112 does not divide the width 576 and 1536")
    expect(studio.get_by_role("button", name="Set group_size to 96", exact=True)).to_be_visible()  # the nearest that divides both
    expect(group).to_be_focused()  # a problem that appears must not take the focus away
    assert lanes_in_python(studio) == [[{"policy": "rtn", "knobs": {"bits": 8, "group_size": 112}}]]
    group.fill("10000")
    mend = studio.get_by_role("button", name="Set group_size to 64")
    expect(row(studio, "Round to nearest").locator(".pe-problem").first).to_contain_text("divisible by 16 from 16 to 256")
    mend.click()
    expect(studio.locator(".pe-problem")).to_have_count(0)
    group = studio.get_by_role("spinbutton", name="group size")
    group.fill("")
    expect(studio.get_by_text("Write a number.")).to_be_visible()


def test_optional_and_boolean_knobs(studio: Page) -> None:
    add(studio, "H2O")
    studio.get_by_label("recent", exact=True).fill("16")
    add(studio, "KIVI")
    studio.get_by_role("checkbox", name="residual").uncheck()
    assert lanes_in_python(studio) == [
        [{"policy": "h2o", "knobs": {"recent": 16}}, {"policy": "kivi", "knobs": {"residual": False}}]
    ]
    studio.get_by_role("button", name="Settings of H2O").click()
    expect(studio.get_by_label("recent", exact=True)).to_have_value("16")
    studio.get_by_label("recent", exact=True).fill("")
    assert lanes_in_python(studio)[0][0] == {"policy": "h2o", "knobs": {}}


def test_policies_that_do_not_fit_are_greyed_with_the_reason(studio: Page) -> None:
    fastv = studio.locator(".pe-card", has_text="FastV")
    expect(fastv).to_contain_text("FastV works on vlm models; smollm2-135m is of family llm")
    expect(fastv.get_by_role("button")).to_be_disabled()
    model = studio.locator("#model input")
    model.fill("someone/vlm-tiny")
    model.press("Enter")
    expect(studio.locator(".pe-card", has_text="SnapKV")).to_contain_text("SnapKV works on llm models")
    expect(fastv.get_by_role("button")).to_be_enabled()


def test_unknown_model_gets_one_sentence(studio: Page) -> None:
    model = studio.locator("#model input")
    model.fill("nobody/nothing")
    model.press("Enter")
    expect(studio.locator("#model-facts")).to_contain_text("is not in the cache and the Hub cannot be reached")


def test_search(studio: Page) -> None:
    studio.get_by_role("searchbox").fill("quantize")
    expect(studio.locator(".pe-card")).to_have_count(1)
    studio.get_by_role("searchbox").fill("no such thing")
    expect(studio.get_by_text("No policy matches.")).to_be_visible()


def test_sweep_copy_undo_and_the_limit_of_four(studio: Page) -> None:
    add(studio, "SnapKV")
    studio.get_by_text("Sweep keep").click()
    studio.get_by_label("Values of keep to sweep").fill("0.1, 0.25, 0.5, 0.75")
    studio.get_by_role("button", name="Make one lane per value of keep").click()
    expect(studio.locator("[data-lane]")).to_have_count(4)
    assert [lane[0]["knobs"] for lane in lanes_in_python(studio)] == [
        {"keep": 0.1},
        {"keep": 0.25},
        {"keep": 0.5},
        {"keep": 0.75},
    ]
    expect(studio.get_by_role("button", name="+ Add a lane")).to_have_count(0)
    expect(studio.get_by_role("button", name="Copy Lane A")).to_be_disabled()
    studio.get_by_role("button", name="Remove Lane D").click()
    studio.get_by_role("button", name="Copy Lane C").click()
    assert [lane[0]["knobs"]["keep"] for lane in lanes_in_python(studio)] == [0.1, 0.25, 0.5, 0.5]
    studio.get_by_role("button", name="Undo").click()
    expect(studio.locator("[data-lane]")).to_have_count(3)


def test_examples_and_saved_pipelines(studio: Page, browser: Browser, studio_url: str) -> None:
    example(studio, "Half the cache")
    assert (lane_names(studio), steps(studio)) == (["Half the cache"], ["SnapKV"])
    name = studio.get_by_label("Name of lane A")
    name.fill("Mine ${window.evil=1} <img src=x onerror='window.evil=1'>")
    name.press("Tab")
    studio.get_by_role("button", name=re.compile("Save Mine")).click()
    expect(studio.locator(".pe-live")).to_have_text(re.compile("Saved as Mine"))
    other = open_studio(browser.new_context().new_page(), studio_url)
    other.get_by_role("button", name=re.compile("^Mine")).click()
    assert steps(other) == ["SnapKV"]
    assert other.evaluate("window.evil") is None
    other.get_by_role("button", name=re.compile("^Forget Mine")).click()
    expect(other.get_by_role("button", name=re.compile("^Forget Mine"))).to_have_count(0)
    other.context.close()


def test_link_restores_everything_in_a_fresh_browser(studio: Page, browser: Browser, studio_url: str) -> None:
    example(studio, "4-bit weights")
    studio.locator("#workload input").click()
    studio.get_by_role("option", name="Needle in a novel").click()
    studio.get_by_role("button", name="Workload options").click()
    studio.get_by_label("length", exact=True).fill("256")
    state = seen_by_python(studio)
    assert (state["workload"], state["options"]) == ("needle", {"length": 256})
    other = open_studio(browser.new_context().new_page(), f"{studio_url}/?p={pack_link(state)}")
    expect(other.locator("#workload input")).to_have_value("Needle in a novel")
    assert steps(other) == ["Round to nearest", "Lean decode"]
    assert seen_by_python(other) == state
    other.context.close()


@pytest.mark.parametrize(
    ("link", "sentence"),
    [
        ("garbage!!", "damaged or is not a pipeline link"),
        (pack_link({"workload": "nope", "model": "m", "lanes": []}), "names the workload 'nope'"),
        (pack_link({"workload": "prompts", "model": "m", "lanes": [{"steps": 3}]}), "is not a pipeline"),
    ],
)
def test_damaged_links_are_refused_in_words(page: Page, studio_url: str, link: str, sentence: str) -> None:
    open_studio(page, f"{studio_url}/?p={link}")
    expect(page.locator("#message")).to_contain_text(sentence)


def test_unknown_policies_in_a_link_are_shown_not_dropped(page: Page, studio_url: str) -> None:
    state = {"model": "smollm2-135m", "workload": "prompts", "options": {}, "settings": {}, "device": "cpu"}
    lanes = [{"name": "From elsewhere", "steps": [{"policy": "from-the-future", "knobs": {"x": [1, 2]}}]}]
    open_studio(page, f"{studio_url}/?p={pack_link({**state, 'lanes': lanes})}")
    expect(row(page, "from-the-future").locator(".pe-problem")).to_contain_text("there is no policy 'from-the-future'")
    assert lanes_in_python(page) == [[{"policy": "from-the-future", "knobs": {"x": [1, 2]}}]]


def test_a_slow_answer_does_not_undo_an_edit(studio: Page) -> None:
    add(studio, "SnapKV")

    def slow(route):
        answer = route.fetch()
        studio.wait_for_timeout(700)
        route.fulfill(response=answer)

    studio.route("**/component_server*", slow)
    add(studio, "H2O")
    studio.get_by_role("button", name="Remove SnapKV from").click()
    studio.wait_for_timeout(2500)
    assert steps(studio) == ["H2O"]
    expect(studio.locator(".pe-problem")).to_have_count(0)
    assert [[s["policy"] for s in lane] for lane in lanes_in_python(studio)] == [["h2o"]]


def test_two_browsers_do_not_share_a_pipeline(studio: Page, browser: Browser, studio_url: str) -> None:
    other = open_studio(browser.new_context().new_page(), studio_url)
    add(studio, "SnapKV")
    add(other, "KIVI")
    assert (lanes_in_python(studio)[0][0]["policy"], lanes_in_python(other)[0][0]["policy"]) == ("snapkv", "kivi")
    other.context.close()
