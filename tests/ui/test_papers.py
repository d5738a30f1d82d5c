"""The papers page: the list, and claims from a click to a verdict that is shown and kept."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from studio_state.catalog import asset
from tests.ui.conftest import start_studio, stop
from tests.ui.test_page import violations

pytestmark = pytest.mark.browser
EVIL = "Cache <img src=x onerror='window.pwned=1'> ${window.pwned=1}"
FACTOR = 1.4  # by which the replayed worker makes lane 1 faster and smaller


def claim(name: str, metric: str, at_most: float, items: int = 2, **more: Any) -> dict[str, Any]:
    experiment = {"id": "a", "workload": {"id": "needle", "options": {"items": items}}, "lanes": ["baseline", "snapkv:keep=0.25"]}
    return {
        "id": name, "title": f"The claim {name}", "reference": "arXiv:2404.14469", "headline": f"Headline of {name}.", "source": "abstract",
        "experiments": [experiment], "fallback": "It may be smaller here.", "minutes": 2,
        "checks": [{"id": "c", "text": "it is smaller", "source": "worked out by hand", "kind": "ratio", "metric": metric, "experiment": "a", "at_most": at_most}],
        "log": [{"date": "2026-01-31", "digest": "0" * 16, "reason": "set before the first run"}], **more,
    }  # fmt: skip


def write_claims(folder: Path) -> Path:
    folder.mkdir()
    holds = claim("holds", "kv_bytes", 0.75, paper="promptdistill", title=EVIL)
    holds["experiments"].append({**holds["experiments"][0], "id": "b"})
    holds["checks"].append({**holds["checks"][0], "id": "faster", "text": "it is faster", "metric": "decode_tokens_per_s", "experiment": "b", "at_most": None, "at_least": 1.3})  # fmt: skip
    breaks = claim("breaks", "kv_bytes", 0.75)
    breaks["experiments"][0]["settings"] = {"seed": 13}
    for data in (holds, breaks, claim("fails", "weight_bytes", 0.5, items=1), claim("lasts", "kv_bytes", 0.75, items=50)):
        (folder / f"{data['id']}.json").write_text(json.dumps(data))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("papers")


@pytest.fixture(scope="module")
def url(data: Path) -> Iterator[str]:
    process, address = start_studio(data, "--claims", str(write_claims(data / "claims")))
    yield address
    stop(process)


def open_papers(page: Page, url: str, theme: str = "light") -> Page:
    page.goto(f"{url}/?__theme={theme}")
    page.get_by_role("tab", name="Papers").click()
    page.locator(".pp-paper").first.wait_for()
    return page


def open_claim(page: Page, name: str) -> Locator:
    panel = page.locator(f"[data-claim={name}]")
    page.locator(f"[aria-controls='{panel.get_attribute('id')}']").click()
    panel.locator(".pc-headline").wait_for()
    return panel


def check(panel: Locator) -> None:
    panel.get_by_role("button", name="Check this claim").click()


def verdicts_in_journal(data: Path, name: str) -> list[dict[str, Any]]:
    file = data / "journal.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [e for e in entries if e["kind"] == "verdict" and e["claim"] == name]


def submitted(data: Path, experiment: str) -> dict[str, Any]:
    return json.loads((data / "spool" / f"{experiment}.jsonl").read_text().splitlines()[0])


def test_all_systems_are_listed_and_what_runs_here_opens_in_the_studio(page: Page, url: str) -> None:
    listed = {p["id"]: p for p in json.loads(asset("papers.json").read_text())["papers"]}
    open_papers(page, url)
    shown = page.locator(".pp-paper:visible")
    assert {i for i in shown.evaluate_all("(rows) => rows.map((r) => r.dataset.paper)") if i in listed} == set(listed)
    expect(page.locator(".pp-count")).to_have_text("68 of 68 systems, and 3 claims on other papers")
    row = page.locator("[data-paper=hired]")
    for text in (
        listed["hired"]["title"],
        listed["hired"]["date"],
        listed["hired"]["summary"],
        "card b1-04",
        "vlm",
        "runs here as",
    ):
        expect(row).to_contain_text(text)
    unbuilt = next(i for i, p in listed.items() if not p["runs_as"])
    expect(page.locator(f"[data-paper='{unbuilt}']")).to_contain_text("not built yet")
    page.get_by_role("button", name="Runs here").click()
    expect(page.locator(".pp-count")).to_contain_text(f"{sum(bool(p['runs_as']) for p in listed.values())} of 68")
    page.get_by_role("button", name="Has a claim").click()
    expect(shown).to_have_count(4)
    page.get_by_role("button", name="All", exact=True).click()
    page.get_by_label("Search papers").fill("b1-04")
    expect(shown).to_have_count(1)
    expect(page.locator(".pp-group:visible")).to_have_count(1)
    page.get_by_label("Search papers").fill("steam engine")
    expect(page.get_by_text("No paper fits this search and filter.")).to_be_visible()
    page.get_by_label("Search papers").fill("")
    row = page.locator("[data-paper=decoding-compressed-trust]")
    expect(row).to_contain_text("runs here as rtn, magnitude")
    row.get_by_role("link", name="rtn").click()
    expect(page.locator("[data-lane] .pe-step .pe-title")).to_have_text(["1. Round to nearest"])


def test_one_click_ends_in_a_verdict_that_is_kept(page: Page, url: str, data: Path) -> None:
    panel = open_claim(open_papers(page, url), "holds")
    for text in (
        "Headline of holds.",
        "2026-01-31",
        "worked out by hand",
        "It may be smaller here.",
        "snapkv:keep=0.25",
        "about 2 min",
        "at least 1.3",
    ):
        expect(panel).to_contain_text(text)
    expect(panel.locator(".ps-empty")).to_contain_text("No verdict yet")
    check(panel)
    expect(panel.get_by_role("button", name="Cancel this check")).to_be_focused()
    expect(panel.locator(".pc-now")).to_contain_text(re.compile("Experiment 2 of 2, b"), timeout=20_000)
    verdict = panel.locator(".pc-verdict")
    expect(verdict).to_have_attribute("data-verdict", "reproduced", timeout=20_000)
    expect(verdict.locator("h5")).to_be_focused()
    entries = verdicts_in_journal(data, "holds")
    runs = entries[0]["numbers"]["runs"]
    assert [e["experiment"] for e in entries] == [runs["a"], runs["b"]]
    assert {(submitted(data, r)["origin"], submitted(data, r)["spec"]["workload"]["id"]) for r in runs.values()} == {
        ("claim", "needle")
    }
    cells = [[c.strip() for c in row.locator("td").all_inner_texts()] for row in verdict.locator("tbody tr").all()]
    assert [c[:2] for c in cells] == [
        ["✓ reproduced", f"KV cache {1 / FACTOR:.2f}×"],
        ["✓ reproduced", f"Decode speed {FACTOR:.2f}×"],
    ]
    assert cells[0][2].startswith("exact")
    assert cells[1][2].startswith("1.40 to 1.40")
    for run in runs.values():
        expect(verdict).to_contain_text(run)
    assert entries[0]["numbers"]["checks"][0]["value"] == pytest.approx(1 / FACTOR)
    assert page.evaluate("window.pwned") is None
    page.get_by_label("Search papers").fill("<img src=x")
    expect(page.locator(".pp-paper:visible")).to_have_count(1)
    expect(page.locator(".pp-paper:visible .pc-opener")).to_contain_text("✓ reproduced")
    again = open_claim(open_papers(page, url), "holds")  # a reload finds it
    expect(again.locator(".pc-verdict")).to_have_count(1)


def test_negative_verdicts_are_listed_too_and_the_keyboard_reaches_all(page: Page, url: str, data: Path) -> None:
    open_papers(page, url)
    page.get_by_label("Search papers").fill("the claim fails")
    for _ in range(5):  # three filters, the paper's method, the claim
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    panel = page.locator("[data-claim=fails]")
    panel.locator(".pc-headline").wait_for()
    for number in (1, 2):
        panel.get_by_role("button", name="Check this claim").focus()
        page.keyboard.press("Enter")
        expect(panel.locator(".pc-verdict")).to_have_count(number, timeout=20_000)
    expect(panel.get_by_role("button", name="Check this claim")).to_be_enabled()
    assert [v.get_attribute("data-verdict") for v in panel.locator(".pc-verdict").all()] == ["not shown", "not shown"]
    assert len(verdicts_in_journal(data, "fails")) == 2
    expect(panel.locator(".pc-earlier summary")).to_have_text("Earlier verdicts (1)")
    expect(panel.locator(".pc-verdict").first).to_contain_text("It may be smaller here.")


def test_it_waits_its_turn_and_only_its_owner_cancels(page: Page, browser: Browser, url: str, data: Path) -> None:
    first = open_claim(open_papers(page, url), "lasts")
    check(first)
    expect(first.locator(".pc-now")).to_contain_text("Racing", timeout=20_000)
    context = browser.new_context(viewport={"width": 1200, "height": 1400})
    other = open_papers(context.new_page(), url)
    theirs = other.locator("[data-claim=lasts]")  # what is being checked stands open
    expect(theirs.locator(".pc-now")).to_contain_text("Racing")
    expect(theirs.get_by_role("button", name="Check this claim")).to_be_disabled()
    expect(theirs.get_by_role("button", name="Cancel this check")).to_have_count(0)
    waiting = open_claim(other, "fails")
    before = len(verdicts_in_journal(data, "fails"))
    check(waiting)
    expect(waiting.locator(".pc-now")).to_contain_text("Experiment 1 of 1, a: Waiting in the queue: place 1")
    waiting.get_by_role("button", name="Cancel this check").click()
    first.get_by_role("button", name="Cancel this check").click()
    for panel in (waiting, first, theirs):
        expect(panel.locator(".pc-state")).to_have_text(
            "Cancelled before a verdict could be given; what was measured is kept in the history."
        )
        expect(panel.get_by_role("button", name="Check this claim")).to_be_enabled()
    assert (verdicts_in_journal(data, "lasts"), len(verdicts_in_journal(data, "fails"))) == ([], before)
    context.close()


def test_a_worker_that_dies_gives_a_sentence_and_no_verdict_and_no_endpoint_is_public(page: Page, url: str, data: Path) -> None:
    panel = open_claim(open_papers(page, url), "breaks")
    check(panel)
    expect(panel.get_by_role("alert")).to_contain_text(
        "experiment a ended as failed: the worker process was ended by SIGKILL", timeout=20_000
    )
    assert verdicts_in_journal(data, "breaks") == []
    with urllib.request.urlopen(f"{url}/gradio_api/info") as answer:
        assert "claim" not in " ".join(json.load(answer)["named_endpoints"])


def test_axe_is_clean_in_both_themes_and_a_phone_is_wide_enough(browser: Browser, url: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, reduced_motion="reduce")
    page = open_papers(context.new_page(), url, "dark")
    panel = open_claim(page, "fails")
    if not panel.locator(".pc-verdict").count():
        check(panel)
    expect(panel.locator(".pc-verdict").first).to_be_visible(timeout=20_000)
    expect(panel.locator(".pc-state")).to_be_empty()
    for theme in ("dark", "light"):
        page.evaluate("(dark) => document.body.classList.toggle('dark', dark)", theme == "dark")
        page.wait_for_timeout(400)  # colours fade from one theme to the other
        assert violations(page) == [], theme
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()
