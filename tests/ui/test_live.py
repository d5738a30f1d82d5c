"""Running and watching: both lanes, numbers, differences, eviction map, reload, second browser, cancel, a dead worker."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.ui.acts import example, lane_column, run, set_number, wait_status
from tests.ui.conftest import open_studio

pytestmark = pytest.mark.browser


def race(page: Page, items: int = 2, seed: int | None = None) -> None:
    """Half the cache against the baseline."""
    example(page, "Half the cache")
    set_number(page, "Workload options", "items", str(items))
    if seed is not None:
        set_number(page, "Measurement settings", "seed", str(seed))
    run(page)


def test_run_shows_both_lanes_numbers_and_text(studio: Page) -> None:
    race(studio)
    wait_status(studio, "finished")
    baseline, lane = lane_column(studio, 0), lane_column(studio, 1)
    expect(baseline.get_by_role("heading")).to_have_text("Baseline")
    expect(lane.get_by_role("heading")).to_have_text("Half the cache")
    expect(lane.locator("[data-metric=decode_tokens_per_s]")).to_have_text(
        re.compile(r"Decode speed\s*42\.2\s*tokens/s\s*▲ 1\.40×\s*1\.33 to 1\.47")
    )
    expect(lane.locator("[data-metric=ttft_s]")).to_contain_text("151")  # 210 ms / 1.4 * 1.005
    expect(lane.locator(".lr-bar").nth(0)).to_contain_text("538 MB")
    expect(baseline.locator(".lr-out")).to_contain_text("before he closed it for the night")
    expect(baseline.locator(".lr-out mark")).to_have_count(0)
    expect(lane.locator(".lr-out mark")).to_have_text("man in ")
    expect(lane).to_contain_text("first differs after 12 tokens; 24 of 26 tokens in common")
    results = studio.locator(".lr-results")
    expect(results.locator("tr[data-metric=kl_to_baseline] td")).to_have_text(["–", re.compile("0.0123nats")])
    expect(results.locator("tr[data-metric=weight_bytes] td").first).to_have_text("538MB")
    expect(studio.locator("#estimate")).to_contain_text("judged by the last run")


def test_charts_have_a_sentence_and_a_table(studio: Page) -> None:
    race(studio)
    wait_status(studio, "finished")
    for name in ("race", "items", "ratios"):
        figure = studio.locator(f"[data-chart={name}]")
        expect(figure.locator("svg")).to_have_attribute("role", "img")
        expect(figure.locator(".lr-summary")).not_to_be_empty()
        figure.get_by_text("Table").click()
        expect(figure.locator("tbody tr").first).to_be_visible()
    expect(studio.locator("[data-chart=race] tbody tr").nth(1)).to_contain_text("42.0 tokens/s")


def test_charts_move_while_it_runs(page: Page, another_studio: Callable[..., str]) -> None:
    open_studio(page, another_studio(step_s=0.1))
    race(page, items=1)
    figure = page.locator("[data-chart=race]")
    figure.wait_for()
    before = int(figure.get_attribute("data-updates") or 0)
    page.wait_for_timeout(2000)
    assert int(figure.get_attribute("data-updates") or 0) - before >= 8  # at least 4 a second


def test_eviction_map(studio: Page) -> None:
    race(studio)
    wait_status(studio, "finished")
    figure = studio.locator(".lr-map")
    expect(figure).to_contain_text("Half the cache keeps 18 of 28 prompt tokens")
    expect(figure.locator(".lr-pieces > span")).to_have_count(28)
    gone = figure.locator(".lr-pieces .lr-gone")
    expect(gone).to_have_count(6)
    assert "lighthouse" not in gone.all_inner_texts()


def test_previous_items_can_be_read(studio: Page) -> None:
    race(studio, items=3)
    wait_status(studio, "finished")
    picker = studio.locator(".lr-picker")
    expect(picker).to_contain_text("Item 3 of 3")
    picker.get_by_role("button", name="Previous item").click()
    expect(picker).to_contain_text("Item 2 of 3")
    expect(lane_column(studio, 1)).to_contain_text("✗ wrong · expected: 4711")
    picker.get_by_role("button", name="Follow the run").click()
    expect(picker).to_contain_text("Item 3 of 3")


def test_reload_and_second_browser_find_the_run(page: Page, browser: Browser, another_studio: Callable[..., str]) -> None:
    url = another_studio(step_s=0.12)
    open_studio(page, url)
    race(page, items=50)  # long: it is cancelled in the end
    expect(lane_column(page, 0).locator(".lr-out")).to_contain_text("The secret number")
    page.reload()
    expect(lane_column(page, 0).locator(".lr-out")).to_contain_text("The secret number")
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    other = open_studio(browser.new_context().new_page(), url)
    other.get_by_role("button", name=re.compile("Watch smollm2-135m · prompts · Half the cache")).click()
    expect(lane_column(other, 0).locator(".lr-out")).to_contain_text("The secret number")
    expect(other.get_by_text("started by someone else")).to_be_visible()
    expect(other.get_by_role("button", name="Cancel")).to_have_count(0)
    page.get_by_role("button", name="Cancel").click()
    wait_status(page, "cancelled")
    wait_status(other, "cancelled")
    other.context.close()


def test_queue_place_and_turns(page: Page, browser: Browser, another_studio: Callable[..., str]) -> None:
    url = another_studio(step_s=0.05)
    open_studio(page, url)
    other = open_studio(browser.new_context().new_page(), url)
    race(page, items=4)
    expect(lane_column(page, 0).locator(".lr-out")).to_contain_text("The secret")
    run(page)  # a second one of the same person
    expect(page.locator(".lr-head")).to_contain_text("Waiting in the queue: place 1")
    race(other, items=1)
    expect(other.locator(".lr-head")).to_contain_text(re.compile("place (1|2)"))
    page.get_by_role("button", name="Cancel").click()
    wait_status(page, "cancelled")
    wait_status(other, "finished", timeout=60_000)
    other.context.close()


def test_killed_worker_says_so_and_the_next_run_works(studio: Page) -> None:
    race(studio, seed=13)
    wait_status(studio, "failed")
    expect(studio.locator(".lr-head [role=alert]")).to_contain_text("worker")
    assert "Traceback" not in studio.locator("body").inner_text()
    studio.get_by_label("seed", exact=True).fill("0")
    run(studio)
    wait_status(studio, "finished")


def test_cancel_frees_a_worker_that_hangs(studio: Page) -> None:
    race(studio, seed=14)
    expect(studio.locator(".lr-head")).to_contain_text("Loading the model")
    studio.get_by_role("button", name="Cancel").click()
    wait_status(studio, "cancelled")
    studio.get_by_label("seed", exact=True).fill("0")
    run(studio)
    wait_status(studio, "finished")


def test_refused_run_lists_the_problems(studio: Page) -> None:
    example(studio, "Half the cache")
    studio.get_by_role("button", name="Settings of SnapKV").click()
    studio.get_by_role("spinbutton", name="keep").fill("7")
    set_number(studio, "Measurement settings", "repeats", "0")
    run(studio)
    expect(studio.locator("#message")).to_contain_text("Repeats = 0 is not allowed")
    studio.get_by_label("repeats", exact=True).fill("1")
    run(studio)
    expect(studio.locator("#message")).to_contain_text(
        "Half the cache: snapkv: keep = 7 is not allowed; allowed: a number from 0.05 to 1.0"
    )


def test_without_websockets_the_page_asks_by_plain_requests(page: Page, studio_url: str) -> None:
    page.route_web_socket(re.compile("/live/"), lambda ws: ws.close())
    open_studio(page, studio_url)
    race(page)
    wait_status(page, "finished", timeout=45_000)
    expect(lane_column(page, 1).locator(".lr-out mark")).to_have_text("man in ")
