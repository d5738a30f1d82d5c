"""Constructed recordings of pictures that lanes draw, whose content is known: as spools that a studio opens, or played live.

``DRAWN``: pictures of clothes, 28 x 28, in 20 steps. Lane 1 takes 87 % of two of every three steps from an earlier one; every
fourth of its pictures equals the baseline's, the others are moved by a pixel. Lane 2 takes 10 steps and blurs. ``STOPPED``:
wide pictures to texts, cancelled in the middle of the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from studio_state import events as ev
from studio_state.experiment import ModelInfo
from tests.ui import pictured
from tests.ui.pictured import CLOTHES, named_class, png, right_class, small

DRAWN, STOPPED = (f"20260{i}03-100000-{i:06x}" for i in range(1, 3))
ITEMS, STEPS = 6, (20, 20, 10)
NAMES = ("Every third step", "Half the steps")
LONG = "step-cache:every=3,threshold=0.15,warmup=2,then=reuse"
REUSED = [0.0 if step % 3 == 0 else 0.87 for step in range(STEPS[1])]
TEXT = "a lighthouse on a cliff under a stormy sky, waves breaking on the rocks below, oil painting with heavy strokes"


@cache
def picture(lane: int, index: int) -> Image.Image:
    """What a lane draws."""
    image = small(index)
    if lane == 1:
        return image if index % 4 == 0 else ImageChops.offset(image, 1, 0)
    return image.filter(ImageFilter.GaussianBlur(1 + index / 4)) if lane == 2 else image


@cache
def look(lane: int, index: int, step: int, of: int) -> Image.Image:
    """The same on its way from noise."""
    image = picture(lane, index)
    noise = np.random.default_rng(index).integers(0, 256, (image.height, image.width), dtype=np.uint8)
    return Image.blend(Image.fromarray(noise), image, step / of)


def psnr(lane: int, index: int) -> float | None:
    """Peak signal-to-noise ratio in decibels to the baseline's picture; None where they are equal."""
    a, b = (np.asarray(picture(i, index), float) / 255 for i in (0, lane))
    error = float(((a - b) ** 2).mean())
    return -10 * float(np.log10(error)) if error else None


def ssim(lane: int, index: int) -> float:
    """Structural similarity with one window as large as the picture."""
    a, b = (np.asarray(picture(i, index), float) / 255 for i in (0, lane))
    both = float(((a - a.mean()) * (b - b.mean())).mean())
    light = (2 * a.mean() * b.mean() + 1e-4) / (a.mean() ** 2 + b.mean() ** 2 + 1e-4)
    return float(light * (2 * both + 9e-4) / (a.var() + b.var() + 9e-4))


def model() -> ev.ModelLoaded:
    """A diffusion model."""
    return ev.ModelLoaded(
        info=ModelInfo(
            name="clothes-diffusion", title="Clothes from noise", family="diffusion", traits=("class-conditional", "dit")
        )
    )


def beginning(*lanes: tuple[str, str, dict[str, float]]) -> Iterator[ev.Event]:
    """Until the first item."""
    yield ev.Submitted(spec=pictured.spec("generate-images", *lanes))
    yield from playing(len(lanes) + 1)


def playing(lanes: int) -> Iterator[ev.Event]:
    """What a worker tells before the first item."""
    yield ev.Started()
    yield model()
    for lane in range(lanes):
        yield ev.LaneStarted(lane=lane, order=("baseline", "step-cache", "half-steps")[lane])


def said(lane: int, index: int) -> str:
    """What the judge sees: in lane 2 something else in every sixth picture."""
    return named_class(1, index) if lane == 2 else right_class(index)


def one(lane: int, index: int, of: int = ITEMS) -> Iterator[ev.Event]:
    """One picture of one lane."""
    item, steps = f"picture-{index}", STEPS[lane]
    yield ev.ItemStarted(lane=lane, item=item, index=index, of=of, prompt=right_class(index))
    for step in range(2, steps, 2):
        yield ev.Preview(lane=lane, item=item, step=step, of=steps, data=png(look(lane, index, step, steps)))
    seconds = (1.2, 0.7, 0.62)[lane] * (1 + index / 50)
    for name, value in (
        ("seconds_per_image", seconds),
        ("images_per_s", 1 / seconds),
        ("denoising_steps_per_s", steps / seconds),
        ("denoising_steps", steps),
        ("denoiser_calls", steps),
        ("class_agreement", float(said(lane, index) == right_class(index))),
    ):
        yield ev.Metric(lane=lane, item=item, name=name, value=value)
    others = [c for c in CLOTHES if c != said(lane, index)]
    yield ev.Output(
        lane=lane,
        item=item,
        kind="image",
        text=said(lane, index),
        expected=right_class(index),
        correct=said(lane, index) == right_class(index),
        data={
            "image": png(picture(lane, index)),
            "labels": [said(lane, index), *others],
            "probabilities": [0.87, 0.05, 0.04, 0.03, 0.01],
            **({"reused": REUSED} if lane == 1 else {}),
        },
    )


def distances(index: int) -> Iterator[ev.Event]:
    """How far the pictures of an item are from the baseline's."""
    for lane in range(3):
        away = psnr(lane, index)
        for name, value in (("ssim", ssim(lane, index)), ("psnr", away), ("same_output", float(away is None))):
            if value is not None:
                yield ev.Metric(lane=lane, item=f"picture-{index}", name=name, value=value)


def race(items: int = ITEMS) -> Iterator[ev.Event]:
    """All pictures, the lanes in turn."""
    for index in range(items):
        for turn in range(3):
            yield from one((index + turn) % 3, index, items)
        yield from distances(index)
    for lane in range(3):
        yield ev.Metric(lane=lane, name="weight_bytes", value=2.4e7)
        yield ev.Metric(lane=lane, name="peak_memory_bytes", value=3.1e7 + 2e6 * (lane == 1))
        if lane:
            pace = (1.71, 1.94)[lane - 1]
            yield ev.Ratio(lane=lane, name="images_per_s", value=pace, low=pace * 0.97, high=pace * 1.03, n=items)
            yield ev.Ratio(lane=lane, name="denoiser_calls", value=STEPS[lane] / STEPS[0], n=items)
    yield from pictured.ends(3)


def drawn(items: int = ITEMS) -> Iterator[ev.Event]:
    """The recording of ``DRAWN``."""
    yield from beginning((NAMES[0], "step-cache", {"every": 3}), (NAMES[1], "half-steps", {"keep": 0.5}))
    yield from race(items)


def wide(lane: int, seed: int) -> Image.Image:
    """A picture of 192 x 128 in colour."""
    across, down = Image.linear_gradient("L").rotate(90).resize((192, 128)), Image.linear_gradient("L").resize((192, 128))
    return Image.merge("RGB", (across, down, Image.new("L", (192, 128), 60 * lane + 40 * seed)))


def stopped() -> Iterator[ev.Event]:
    """Two lanes; the second picture of lane 1 is never finished, the third never begun."""
    yield from beginning((LONG, "step-cache", {"every": 3}))
    for index, lane in ((0, 0), (0, 1), (1, 0), (1, 1)):
        item = f"picture-{index}"
        yield ev.ItemStarted(lane=lane, item=item, index=index, of=3, prompt=TEXT)
        yield ev.Preview(lane=lane, item=item, step=7, of=20, data=png(look(0, index, 7, 20)))
        if (index, lane) == (1, 1):
            break
        yield ev.Metric(lane=lane, item=item, name="seconds_per_image", value=31.5 - 12 * lane)
        yield ev.Output(lane=lane, item=item, kind="image", data={"image": png(wide(lane, index))})
        if lane:
            yield ev.Metric(lane=lane, item=item, name="psnr", value=21.437)
            yield ev.Metric(lane=lane, item=item, name="ssim", value=0.8126)
    for lane in range(2):
        yield ev.LaneFinished(lane=lane, status="cancelled")
    yield ev.Cancelled()


def record_all(folder: Path) -> None:
    """Both of them."""
    for experiment, events in ((DRAWN, drawn()), (STOPPED, stopped())):
        pictured.record(folder, experiment, events)
