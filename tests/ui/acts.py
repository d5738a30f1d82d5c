"""What a person does on the page, in words that tests share."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

from playwright.sync_api import Locator, Page, expect

from studio_state.pipeline import unpack_link
from tests.sampling import first

THEMES = first(1, "dark", "light")


def steps(page: Page, lane: int = 0) -> list[str]:
    """Titles of the steps of an own lane, in the order shown."""
    return [
        re.sub(r"^\d+\. ", "", t) for t in page.locator("[data-lane]").nth(lane).locator(".pe-step .pe-title").all_inner_texts()
    ]


def lane_names(page: Page) -> list[str]:
    """Names of the own lanes as shown."""
    return [n.input_value() or n.get_attribute("placeholder") or "" for n in page.locator("[data-lane] input.pe-lane-name").all()]


def add(page: Page, title: str) -> None:
    """Press + on a policy."""
    page.get_by_role("button", name=f"Add {title} to", exact=False).click()


def example(page: Page, name: str) -> None:
    """Take an example pipeline."""
    page.get_by_role("group", name="Example and saved pipelines").get_by_role("button", name=name, exact=True).click()


def centre(locator: Locator) -> tuple[float, float]:
    """The middle of an element, scrolled into view, once it has stood still for a quarter of a second as a person would wait."""
    x, y = locator.evaluate(
        """async (node) => {
          const middle = () => { const r = node.getBoundingClientRect(); return [r.left + r.width / 2, r.top + r.height / 2]; };
          node.scrollIntoView({block: 'nearest'});
          for (let at = middle(), since = performance.now(); ;) {
            await new Promise(requestAnimationFrame);
            const now = middle();
            if (now[0] !== at[0] || now[1] !== at[1]) { at = now; since = performance.now(); node.scrollIntoView({block: 'nearest'}); }
            else if (performance.now() - since > 250) return at;
          }
        }"""
    )
    return x, y


def drag(page: Page, start: tuple[float, float], end: tuple[float, float], drop: bool = True) -> None:
    """Drag with the mouse."""
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end, steps=10)
    if drop:
        page.mouse.up()


def drag_into(page: Page, source: Locator, target: Locator) -> None:
    """Drag one element into another, once both are in view: bringing the second there may move the first."""
    for _ in range(5):
        start, end = centre(source), centre(target)
        if centre(source) == start:
            break
    drag(page, start, end)


def card(page: Page, policy: str) -> Locator:
    """A policy in the palette."""
    return page.locator(f".pe-card[data-policy={policy}] .pe-title")


def seen_by_python(page: Page) -> dict[str, Any]:
    """What the server makes of the page: the content of its shareable link."""
    page.evaluate("document.querySelector('#link-box .ps-link-place').replaceChildren()")
    page.get_by_role("button", name="Copy link").click()
    box = page.get_by_label("Link to this experiment")
    expect(box).to_have_value(re.compile("p="))
    assert page.url == box.input_value()
    return unpack_link(parse_qs(urlsplit(page.url).query)["p"][0])


def lanes_in_python(page: Page) -> list[list[dict[str, Any]]]:
    """Steps of every own lane as the server sees them."""
    return [lane["steps"] for lane in seen_by_python(page)["lanes"]]


def set_number(page: Page, accordion: str, label: str, value: str) -> None:
    """Open a form and type a number."""
    field = page.get_by_label(label, exact=True)
    if not field.is_visible():
        page.get_by_role("button", name=accordion).click()
    field.fill(value)


def run(page: Page) -> None:
    """Press Run."""
    page.get_by_role("button", name="Run", exact=True).click()


def wait_status(page: Page, status: str, timeout: float = 30_000) -> None:
    """Wait until the watched experiment has this status."""
    expect(page.locator(".lr-head")).to_have_attribute("data-status", status, timeout=timeout)


def lane_column(page: Page, index: int) -> Locator:
    """Column of a lane in the live view; 0 = baseline."""
    return page.locator(f".lr-lane[data-lane-index='{index}']")
