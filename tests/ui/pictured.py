"""Constructed recordings of experiments on images, whose content is known: as spools that a studio opens.

``VLM``: item 0 is dark with a bright square in its top right quarter, on 12 x 12 tokens; one lane kept exactly the tokens
of that quarter, one merged all tokens in squares of four, one dropped the others half-way. Item 1 has a whole view and four
tiles. ``CLASSES``: many small images, named by two lanes. ``MAPS``: one saliency map a lane.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image, ImageDraw

from studio_state import events as ev
from studio_state.experiment import ExperimentSpec, WorkloadSpec
from studio_state.pipeline import Pipeline, Step
from studio_state.spool import SpoolWriter

VLM, CLASSES, MAPS, PLAIN = (f"20260{i}02-100000-{i:06x}" for i in range(1, 5))
SIDE = 12
TOKENS = SIDE * SIDE
QUARTER = [i for i in range(TOKENS) if i // SIDE < SIDE // 2 and i % SIDE >= SIDE // 2]
QUESTION = "Where is the bright square?"
PROMPT = f"<|im_start|>User:<image>{QUESTION}<end_of_utterance>\nAssistant:"
IMAGES = 24
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Ankle boot")


def spec(workload: str, *lanes: tuple[str, str, dict[str, float]]) -> ExperimentSpec:
    """Lanes as (name, policy, knobs)."""
    own = tuple(Pipeline(name=name, steps=(Step(policy=policy, knobs=knobs),)) for name, policy, knobs in lanes)
    return ExperimentSpec(model="scene-vlm", workload=WorkloadSpec(id=workload), lanes=own)


def grid(across: int, down: int, box: tuple[int, int, int, int] = (0, 0, 10_000, 10_000)) -> list[list[int]]:
    """Boxes of tokens in reading order, in a part of the image."""
    left, top, right, bottom = box
    xs = [left + round((right - left) * i / across) for i in range(across + 1)]
    ys = [top + round((bottom - top) * i / down) for i in range(down + 1)]
    return [[xs[c], ys[r], xs[c + 1], ys[r + 1]] for r in range(down) for c in range(across)]


def ranked(first: list[int], total: int) -> list[float]:
    """Levels in steps of 5 %, the tokens of ``first`` before all others."""
    order = first + [i for i in range(total) if i not in first]
    level = [0.0] * total
    for rank, token in enumerate(order):
        level[token] = round(math.ceil((rank + 1) / total * 20 - 1e-9) / 20, 2)
    return level


def png(image: Image.Image) -> str:
    """An image as base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def square(width: int = 360, height: int = 360) -> Image.Image:
    """Dark, with a bright top right quarter."""
    image = Image.new("RGB", (width, height), (20, 60, 20))
    ImageDraw.Draw(image).rectangle((width // 2, 0, width, height // 2 - 1), fill=(250, 220, 60))
    return image


def picture(item: str, image: Image.Image, boxes: list[list[int]], views: list[int] | None = None) -> ev.Picture:
    """The event of an image."""
    return ev.Picture(
        item=item,
        mime="image/png",
        data=png(image),
        width=image.width,
        height=image.height,
        boxes=boxes,
        views=views or [0] * len(boxes),
    )


def answer(lane: int, item: str, text: str, expected: str) -> Iterator[ev.Event]:
    """A word of two tokens, right or wrong."""
    half = len(text) // 2
    yield ev.Tokens(
        lane=lane, item=item, ids=[sum(map(ord, text)), 2], text=text[:half] + text[half:], at=[0.1 + lane / 50, 0.15 + lane / 50]
    )
    yield ev.Metric(lane=lane, item=item, name="ttft_s", value=0.1 + lane / 50)
    yield ev.Metric(lane=lane, item=item, name="accuracy", value=float(text == expected))
    yield ev.Output(lane=lane, item=item, text=text, expected=expected, correct=text == expected)


def squares_of_four() -> list[int]:
    """Groups of 2 x 2 tokens, those of the top row not merged."""
    return [1000 + i if i < SIDE * 2 else (i // SIDE // 2) * SIDE + i % SIDE // 2 for i in range(TOKENS)]


def vlm() -> Iterator[ev.Event]:
    """Two questions, four lanes."""
    yield ev.Submitted(
        spec=spec(
            "vqa",
            ("A quarter of the tokens", "divprune", {"keep": 0.25}),
            ("Merged", "tome", {"keep": 0.3}),
            ("Dropped half-way", "fastv", {"keep": 0.25}),
        )
    )
    yield ev.Started()
    for lane, name in enumerate(("baseline", "divprune", "tome", "fastv")):
        yield ev.LaneStarted(lane=lane, order=name)
    yield picture("square", square(), grid(SIDE, SIDE))
    clear = [float(i in QUARTER) for i in range(TOKENS)]
    for lane in range(4):
        yield ev.ItemStarted(lane=lane, item="square", index=0, of=2, prompt=PROMPT if lane == 0 else "")
        said = ("top right", "top right", "bottom", "top right")[lane]
        yield from answer(lane, "square", said, "top right")
        half = [1.0 if i in QUARTER else 0.5 for i in range(TOKENS)]
        yield ev.ImageTokens(
            lane=lane,
            item="square",
            share=([1.0] * TOKENS, clear, [1.0] * TOKENS, half)[lane],
            level=ranked(QUARTER, TOKENS) if lane == 1 else [],
            group=squares_of_four() if lane == 2 else [],
        )
    tiles = [box for y in (0, 5000) for x in (0, 5000) for box in grid(4, 4, (x, y, x + 5000, y + 5000))]
    boxes = [*grid(4, 4), *tiles, []]
    yield picture("tiles", square(480, 300), boxes, [0] * 16 + [1 + i // 16 for i in range(64)] + [4])
    for lane in range(4):
        yield ev.ItemStarted(lane=lane, item="tiles", index=1, of=2, prompt=PROMPT if lane == 0 else "")
        yield from answer(lane, "tiles", "right" if lane == 3 else "left", "right")
        yield ev.ImageTokens(lane=lane, item="tiles", share=[1.0 if lane == 0 or i % 4 == 3 else 0.0 for i in range(81)])
    yield from ends(4)


def ends(lanes: int) -> Iterator[ev.Event]:
    """All went well."""
    for lane in range(lanes):
        yield ev.LaneFinished(lane=lane, status="finished")
    yield ev.Finished(seconds=1.0)


def right_class(index: int) -> str:
    """What an image of ``CLASSES`` shows."""
    return CLOTHES[index % len(CLOTHES)]


def named_class(lane: int, index: int) -> str:
    """What a lane says: the baseline is wrong on every eighth image, the other lane on every sixth."""
    return CLOTHES[(index + (index % (8, 6)[lane] == 5)) % len(CLOTHES)]


def small(index: int) -> Image.Image:
    """A grey shape of 28 x 28, another one for every item."""
    image = Image.new("L", (28, 28), 0)
    ImageDraw.Draw(image).polygon(
        [(4, 24), (6 + index % 9, 3 + index % 5), (24, 8 + index % 11), (20, 25)], fill=120 + index % 120
    )
    return image


def classes(count: int = IMAGES) -> Iterator[ev.Event]:
    """Small images, two lanes, the five likeliest classes of each."""
    yield ev.Submitted(spec=spec("classify", ("Half the patches", "attention-prune", {"keep": 0.5})))
    yield ev.Started()
    for lane in range(2):
        yield ev.LaneStarted(lane=lane, order=("baseline", "attention-prune")[lane])
    for index in range(count):
        item = f"test-{index}"
        yield picture(item, small(index), grid(7, 7))
        for lane in range(2):
            yield ev.ItemStarted(lane=lane, item=item, index=index, of=count)
            said, expected = named_class(lane, index), right_class(index)
            others = [c for c in CLOTHES if c != said]
            yield ev.Metric(lane=lane, item=item, name="accuracy", value=float(said == expected))
            yield ev.Metric(lane=lane, item=item, name="images_per_s", value=200.0 + 90 * lane + index)
            yield ev.Output(
                lane=lane,
                item=item,
                kind="label",
                text=said,
                expected=expected,
                correct=said == expected,
                data={"labels": [said, *others], "probabilities": [0.624, 0.2, 0.1, 0.05, 0.026]},
            )
            yield ev.ImageTokens(lane=lane, item=item, share=[1.0 if lane == 0 or i % 2 else 0.4 for i in range(49)])
    yield from ends(2)


def maps() -> Iterator[ev.Event]:
    """One image, a saliency map of each lane."""
    yield ev.Submitted(spec=spec("classify", ("Half the patches", "attention-prune", {"keep": 0.5})))
    yield ev.Started()
    yield picture("photo", square(), [])
    for lane in range(2):
        yield ev.LaneStarted(lane=lane, order=("baseline", "attention-prune")[lane])
        yield ev.ItemStarted(lane=lane, item="photo", index=0, of=1)
        yield ev.Output(lane=lane, item="photo", kind="image", data={"image": png(Image.linear_gradient("L").resize((24, 24)))})
    yield from ends(2)


def plain() -> Iterator[ev.Event]:
    """No image at all."""
    yield ev.Submitted(spec=spec("prompts", ("Half", "snapkv", {"keep": 0.5})))
    yield ev.Started()
    for lane in range(2):
        yield ev.ItemStarted(lane=lane, item="a", index=0, of=1, prompt="Hello")
        yield from answer(lane, "a", "top right", "top right")
    yield from ends(2)


def record(folder: Path, experiment: str, events: Iterable[ev.Event]) -> None:
    """Write a spool."""
    folder.mkdir(parents=True, exist_ok=True)
    with SpoolWriter(folder / f"{experiment}.jsonl") as spool:
        for n, event in enumerate(events):
            spool.append(event.model_copy(update={"experiment": "", "t": 1.77e9 + n / 100}))


def record_all(folder: Path) -> None:
    """All of them."""
    for experiment, events in ((VLM, vlm()), (CLASSES, classes()), (MAPS, maps()), (PLAIN, plain())):
        record(folder, experiment, events)
