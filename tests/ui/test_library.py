"""The library on recorded experiments: the card in words, conflicts, and every run that used a method, good or bad."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.recorded import AGAIN, CHOICE, SWEEP, TEXT
from tests.ui.acts import THEMES, lane_names, steps
from tests.ui.recorded_studio import lines, recorded_studio
from tests.ui.test_page import violations

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("library")


@pytest.fixture(scope="module")
def url(data: Path) -> Iterator[str]:
    yield from recorded_studio(data)


def open_method(page: Page, url: str, title: str, theme: str = "light") -> Page:
    page.goto(f"{url}/?__theme={theme}")
    page.get_by_role("tab", name="Library").click()
    page.locator(".ml-page h2").wait_for()
    page.locator(".ml-item", has_text=re.compile(f"^{re.escape(title)}$")).click()
    expect(page.locator(".ml-page h2")).to_have_text(title)
    return page


def section(page: Page, title: str) -> str:
    return page.locator(".ml-section", has=page.get_by_role("heading", name=title)).inner_text()


def test_the_card_in_words(page: Page, url: str) -> None:
    open_method(page, url, "SnapKV")
    expect(page.locator(".ml-stages [aria-current=step]")).to_have_text("kv")
    knobs = page.locator(".ml-section", has=page.get_by_role("heading", name="Knobs")).locator("tbody tr")
    expect(knobs).to_have_count(2)
    expect(knobs.first).to_contain_text(re.compile(r"keep.*share of prompt positions kept.*a number from 0.05 to 1.*0.5"))
    assert "decides alone: which positions the key-value cache keeps" in section(page, "What it touches")
    against = section(page, "Cannot stand with")
    assert re.findall(r"^(H2O|KIVI|Prompt lookup|Round to nearest|Lean decode)", against, re.MULTILINE) == [
        "H2O",
        "Prompt lookup",
    ]
    page.locator(".ml-section").get_by_role("button", name="Prompt lookup").click()
    expect(page.locator(".ml-page h2")).to_have_text("Prompt lookup")
    assert "SnapKV" in section(page, "Cannot stand with")


def test_every_run_is_listed_bad_ones_too(page: Page, url: str, data: Path) -> None:
    open_method(page, url, "SnapKV")
    used = [(x, i) for x in (SWEEP, AGAIN, TEXT, CHOICE) for i, lane in enumerate(lines(data, x, "submitted")[0]["spec"]["lanes"])
            if any(s["policy"] == "snapkv" for s in lane["steps"])]  # fmt: skip
    rows = page.locator(".ml-section", has=page.get_by_role("heading", name="Runs here")).locator("tbody tr")
    expect(rows).to_have_count(len(used))
    page.locator(".ml-item", has_text="Round to nearest").click()
    expect(rows).to_have_count(2)
    accuracy = next(e for e in lines(data, CHOICE, "ratio") if e["lane"] == 1 and e["name"] == "accuracy")
    cell = rows.filter(has_text="multiple-choice").locator(".ml-ratio", has_text="Accuracy")
    expect(cell).to_contain_text(f"{accuracy['value']:.2f}×")
    assert ("worse" in cell.inner_text()) == ((accuracy["high"] or accuracy["value"]) < 1)


def test_a_method_without_runs_says_what_to_do(page: Page, url: str) -> None:
    open_method(page, url, "Magnitude pruning")
    expect(page.locator(".ml-page .ps-empty")).to_contain_text(
        "No run has used Magnitude pruning yet. Open a lane with it in the Studio"
    )
    page.get_by_role("link", name="Open a lane with Magnitude pruning in the Studio").click()
    page.locator("#editor [data-ready='1'], #editor[data-ready='1']").first.wait_for()
    expect(page.locator("[data-lane] .pe-step")).to_have_count(1)  # a lane is there before its steps are
    assert steps(page) == ["Magnitude pruning"]
    assert lane_names(page) == ["Magnitude pruning"]


def test_a_recipe_says_how_to_train_it(page: Page, url: str) -> None:
    open_method(page, url, "ViT on Fashion-MNIST")
    command = "pareto-studio train fashion-vit --out DIR"
    assert command in section(page, "At a glance")
    expect(page.locator(".ml-page .ps-empty")).to_contain_text(f"A recipe stands in no lane; it trains a model: {command}")
    expect(page.locator(".ml-stages, .ml-try")).to_have_count(0)
    assert page.locator(".ml-section h3").all_inner_texts() == [
        "At a glance",
        "Knobs",
        "Cannot stand with",
        "Runs here",
    ]
    assert violations(page) == []


def test_search_and_keyboard(page: Page, url: str) -> None:
    open_method(page, url, "H2O")
    page.get_by_label("Search methods").fill("guess")
    expect(page.get_by_text("No method fits this search.")).to_be_visible()
    page.get_by_label("Search methods").fill("kivi")
    expect(page.locator(".ml-item")).to_have_count(1)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".ml-page h2")).to_have_text("KIVI")
    expect(page.locator(".ml-page")).to_be_focused()


@pytest.mark.parametrize("theme", THEMES)
def test_axe_is_clean(page: Page, url: str, theme: str) -> None:
    open_method(page, url, "Round to nearest", theme)
    assert violations(page) == []


def test_phone_width(browser: Browser, url: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = open_method(context.new_page(), url, "SnapKV")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()
