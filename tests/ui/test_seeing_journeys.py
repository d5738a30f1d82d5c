"""Journeys on the real page with the real worker and the studio's own models that see: one click on an example, Run, look."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.ui.acts import example, lane_column, run, set_number, wait_status
from tests.ui.conftest import open_studio, stop
from tests.ui.picture_acts import panel
from tests.ui.real_studio import link, start_real_studio

pytestmark = pytest.mark.browser

PATIENCE_MS = 120_000


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a running studio."""
    process, url = start_real_studio(tmp_path_factory.mktemp("seeing"))
    yield url
    stop(process)


@pytest.mark.slow
def test_an_example_for_images_brings_its_model_and_workload(page: Page, seeing: str) -> None:
    open_studio(page, seeing)
    example(page, "Merge ViT tokens")
    expect(page.locator("#model input")).to_have_value("ViT on Fashion-MNIST · vit")
    expect(page.locator("#workload input")).to_have_value("Classify images")
    expect(page.locator("#workload-facts")).to_contain_text("image")
    set_number(page, "Workload options", "items", "30")
    run(page)
    wait_status(page, "finished", PATIENCE_MS)
    for lane in (0, 1):
        expect(lane_column(page, lane).locator(".li-bar")).to_have_count(5)
    expect(panel(page, 1).locator(".li-caption")).to_contain_text("49 tokens merged into 24")
    expect(page.locator(".lg-tile")).to_have_count(30)


@pytest.mark.slow
def test_an_example_bound_to_its_model_brings_it_although_the_family_is_the_same(page: Page, seeing: str) -> None:
    open_studio(page, seeing)
    example(page, "Prune experts")
    expect(page.locator("#model input")).to_have_value("Mixture of experts on Jane Austen · llm")
    expect(page.locator("#workload input")).to_have_value("Perplexity")
    set_number(page, "Workload options", "items", "2")
    run(page)
    wait_status(page, "finished", PATIENCE_MS)
    expect(page.locator("[data-experts='1']")).to_contain_text("8 of 32 experts, counted layer by layer, got no token")
    expect(page.locator("[data-experts='0']")).not_to_contain_text("got no token")


def test_four_fifths_of_the_visual_tokens_are_dropped_and_shown(page: Page, seeing: str) -> None:
    open_studio(page, seeing)
    example(page, "Drop 80 % of the visual tokens")
    expect(page.locator("#workload input")).to_have_value("Questions about images")
    set_number(page, "Workload options", "items", "6")
    run(page)
    wait_status(page, "finished", PATIENCE_MS)
    caption = panel(page, 1).locator(".li-caption")
    expect(panel(page, 0).locator(".li-caption")).to_contain_text("144 of 144 image tokens kept")
    expect(caption).to_contain_text("28 of 144 image tokens kept")
    slider = panel(page, 1).locator("input[type=range]")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(caption).not_to_contain_text("28 of 144")
    expect(lane_column(page, 1)).to_contain_text("expected")


def test_a_models_family_chooses_among_the_workloads(page: Page, seeing: str) -> None:
    open_studio(page, seeing)
    field = page.locator("#model input")
    field.click()
    page.get_by_role("option", name="LLaVA on scenes of coloured shapes · vlm", exact=True).click()
    expect(page.locator("#workload input")).to_have_value("Questions about images")
    page.locator("#workload input").click()
    expect(page.get_by_role("option", name="Classify images (for vit models)")).to_be_visible()


def test_a_persons_own_folder_of_pictures(browser: Browser, seeing: str, tmp_path: Path) -> None:
    """Keyboard only, at phone width, in the dark."""
    rng = np.random.default_rng(1)
    for name in ("bag", "sneaker"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (300, 200, 4), dtype=np.uint8)).save(tmp_path / "mine" / name / "a.png")
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    try:
        page.goto(link(seeing, "fashion-vit", "classify", {"source": str(tmp_path / "mine")}, {"threads": 1}))
        expect(page.locator("#workload-facts")).to_contain_text("image", timeout=PATIENCE_MS)
        page.get_by_role("button", name="Run", exact=True).focus()
        page.keyboard.press("Enter")
        wait_status(page, "finished", PATIENCE_MS)
        expect(page.locator(".lg-tile")).to_have_count(2)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    finally:
        page.close()


def test_labels_that_no_class_has_are_said_on_the_page(page: Page, seeing: str, tmp_path: Path) -> None:
    (tmp_path / "zebra").mkdir()
    Image.new("RGB", (40, 40), "white").save(tmp_path / "zebra" / "a.png")
    page.goto(link(seeing, "fashion-vit", "classify", {"source": str(tmp_path)}, {"threads": 1}))
    expect(page.locator("#workload-facts")).to_contain_text("image", timeout=PATIENCE_MS)
    run(page)
    wait_status(page, "failed", PATIENCE_MS)
    expect(page.locator("#race")).to_contain_text("zebra")
