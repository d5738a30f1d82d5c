"""Takes the pictures of the README from the running studio: ``make screenshots``.

The real page, the real worker, SmolLM2 and two example pipelines on a short workload. Writes
``assets/images/studio-{light,dark,phone}.png`` and ``race.gif``; stops where one is larger than it may be.
"""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser import launch_options
from tests.ui.acts import example, run, wait_status
from tests.ui.conftest import CHROMIUM_ARGS, open_studio, stop
from tests.ui.real_studio import link, start_real_studio

IMAGES = Path(__file__).parents[2] / "assets" / "images"
EXAMPLES = ("Half the cache", "Everything at once")
OPTIONS = {"items": 2, "length": 128}
SETTINGS = {"max_new_tokens": 24, "threads": 1}
DESK, PHONE = {"width": 1280, "height": 1560}, {"width": 390, "height": 844}
FRAMES, FRAME_MS, LAST_MS = 9, 900, 4000
EVERY_S = 0.4
PATIENCE_MS = 300_000
MAX_PNG, MAX_GIF = 300_000, 1_500_000


def start_race(page: Page, url: str) -> None:
    """Compose and press Run."""
    open_studio(page, link(url, "smollm2-135m", "needle", OPTIONS, SETTINGS))
    for name in EXAMPLES:
        example(page, name)
    run(page)
    page.locator(".lr-lane").first.wait_for(timeout=PATIENCE_MS)
    page.locator(".lr-out").first.wait_for(timeout=PATIENCE_MS)


def watch_race(page: Page) -> list[Image.Image]:
    """Pictures of the lanes until the race is over, the last one with the result."""
    taken = []
    while page.locator(".lr-head").get_attribute("data-status") in ("queued", "running"):
        taken.append(picture_of_race(page))
        time.sleep(EVERY_S)
    wait_status(page, "finished")
    page.wait_for_timeout(500)
    return [*taken, picture_of_race(page)]


def picture_of_race(page: Page) -> Image.Image:
    """Headline and columns of the lanes."""
    head, lanes = page.locator(".lr-head").bounding_box(), page.locator(".lr-lanes").bounding_box()
    if head is None or lanes is None:
        raise RuntimeError("the race is not on the page")
    left, top = max(0.0, head["x"] - 12), head["y"] - 8
    size = {"width": head["width"] + 24, "height": lanes["y"] + lanes["height"] + 8 - top}
    return read(page.screenshot(clip={"x": left, "y": top, **size}, full_page=True))


def read(data: bytes) -> Image.Image:
    """A picture from bytes."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def animate(frames: list[Image.Image], path: Path) -> None:
    """A few of the frames, evenly spread and all as high as the highest, as one stepwise GIF with one palette."""
    step = max(1, (len(frames) - 1) // (FRAMES - 1))
    chosen = [*frames[:-1:step][: FRAMES - 1], frames[-1]]
    width, height = chosen[0].width, max(f.height for f in chosen)
    padded = []
    for frame in chosen:
        canvas = Image.new("RGB", (width, height), frame.getpixel((0, 0)))
        canvas.paste(frame)
        padded.append(canvas)
    palette = padded[-1].quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    first, *rest = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in padded]
    times = [*[FRAME_MS] * len(rest), LAST_MS]
    first.save(path, save_all=True, append_images=rest, duration=times, loop=0, optimize=True)
    check_size(path, MAX_GIF)


def save(data: bytes, path: Path) -> None:
    """A screenshot as a PNG of at most 256 colours."""
    read(data).quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    check_size(path, MAX_PNG)


def check_size(path: Path, most: int) -> None:
    """Say what was written.

    Raises:
        RuntimeError: it is too large for a README.
    """
    size = path.stat().st_size
    if size > most:
        raise RuntimeError(f"{path} has {size:,} bytes; at most {most:,} are allowed: take fewer frames or a smaller window")
    print(f"{path.relative_to(IMAGES.parents[1])}: {size:,} bytes")


def take(browser: Browser, url: str, name: str, theme: str, watched: str, **device: object) -> None:
    """One picture of the finished race on another device or in another theme."""
    context = browser.new_context(**device)  # type: ignore[arg-type]
    page = open_studio(
        context.new_page(), f"{link(url, 'smollm2-135m', 'needle', OPTIONS, SETTINGS)}&__theme={theme}&e={watched}"
    )
    for example_name in EXAMPLES:
        example(page, example_name)
    wait_status(page, "finished")
    page.wait_for_timeout(1500)  # estimate and charts
    if device.get("is_mobile"):
        page.locator(".lr-head").evaluate("(node) => node.scrollIntoView({block: 'start'})")
    save(page.screenshot(), IMAGES / f"studio-{name}.png")
    context.close()


def main() -> None:
    """All pictures from one race."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        studio, url = start_real_studio(Path(folder))
        try:
            browser = playwright.chromium.launch(**launch_options(), args=CHROMIUM_ARGS)  # type: ignore[arg-type]
            page = browser.new_page(viewport={"width": 1120, "height": 1700})
            start_race(page, url)
            animate(watch_race(page), IMAGES / "race.gif")
            watched = page.evaluate("localStorage.getItem('pareto-studio-watched')")
            for name, theme in (("light", "light"), ("dark", "dark")):
                take(browser, url, name, theme, watched, viewport=DESK)
            take(browser, url, "phone", "light", watched, viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)
            browser.close()
        finally:
            stop(studio)


if __name__ == "__main__":
    main()
