"""Telling a race: steps and caches as events, small enough to send and never inside a timed interval."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from studio_state.events import CacheMap, Event, ExpertLoad, ImageTokens, Kept, Picture, Preview, Tokens
from workers.families.base import RunTrace, SeenImage, StepResult
from workers.mechanisms.visual_tokens import ImageRecord
from workers.session import Session
from workers.workloads.base import Item, ItemResult

FLUSH_SECONDS = 0.1  # text is told at most this often


class Teller:
    """Turns steps into token events, not more often than ten times a second."""

    def __init__(self, lane: int, batch: Sequence[Item], repeat: int):
        self.lane, self.batch, self.repeat = lane, batch, repeat
        self.elapsed = 0.0
        self.told = time.perf_counter()
        self.waiting: list[tuple[list[int], str, list[float]]] = [([], "", []) for _ in batch]

    def heard(self, step: StepResult) -> Iterator[Event]:
        """Take a step in; tell what waits if it is time."""
        self.elapsed += step.seconds
        for item, picture in zip(self.batch, step.pictures, strict=False):
            yield Preview(lane=self.lane, item=item.id, repeat=self.repeat, step=step.place[0], of=step.place[1], data=picture)
        for row, ids in enumerate(step.new[: len(self.batch)]):
            old_ids, text, at = self.waiting[row]
            self.waiting[row] = (
                old_ids + ids,
                text + (step.text[row] if row < len(step.text) else ""),
                at + [self.elapsed] * len(ids),
            )
        if time.perf_counter() - self.told >= FLUSH_SECONDS:
            yield from self.rest()

    def rest(self) -> Iterator[Event]:
        """Tell everything that waits."""
        for item, (ids, text, at) in zip(self.batch, self.waiting, strict=True):
            if ids or text:
                yield Tokens(lane=self.lane, item=item.id, repeat=self.repeat, ids=ids, text=text, at=[round(x, 6) for x in at])
        self.waiting = [([], "", []) for _ in self.batch]
        self.told = time.perf_counter()


def batch_key(items: Sequence[Item]) -> str:
    """Name of a batch in the record: its item, or first..last."""
    return items[0].id if len(items) == 1 else f"{items[0].id}..{items[-1].id}"


def first_difference(mine: ItemResult, theirs: ItemResult) -> int:
    """Tokens before two outputs differ; the shorter length if one begins the other; the length if equal."""
    pairs = zip(mine.token_ids, theirs.token_ids, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(mine.token_ids), len(theirs.token_ids)))


def kept_event(lane: int, item: str, layers: list[list[float]]) -> Kept:
    """The eviction map of one item, small enough to send."""
    share = [sum(column) / len(layers) for column in zip(*layers, strict=True)]
    return Kept(
        lane=lane,
        item=item,
        share=[round(s, 4) for s in share],
        layers=["".join(str(round(9 * x)) for x in layer) for layer in layers],
    )


def cache_map_event(session: Session, lane: int, trace: RunTrace, row: int) -> CacheMap:
    """What every head held of one item at some moments, with what of its prompt matters."""
    result = trace.results[row]
    mark = getattr(getattr(session.model, "config", None), "image_token_id", None)
    return CacheMap(
        lane=lane,
        item=result.item.id,
        heads=trace.heads,
        frames=trace.frames[row],
        marked=marked_tokens(session, result),
        image=[place for place, token in enumerate(result.prompt_ids) if token == mark] if mark is not None else [],
    )


def marked_tokens(session: Session, result: ItemResult) -> list[int]:
    """Tokens of the prompt that hold the characters which the item names as needed: [first, behind the last], or empty."""
    span = result.item.data.get("needle_span")
    if not span:
        return []
    pieces = [session.processor.decode([t]) for t in result.prompt_ids]
    ends = list(accumulate(map(len, pieces)))
    start = "".join(pieces).find(result.item.prompt[span[0] : span[1]])
    if start < 0:
        return []
    stop = start + span[1] - span[0]
    return [bisect_right(ends, start), bisect_left(ends, stop) + 1]


def picture_event(item: str, image: SeenImage) -> Picture:
    """The image of an item and where its tokens lie."""
    return Picture(item=item, boxes=image.layout.boxes, views=image.layout.views, **image.shown)


def image_tokens_event(lane: int, item: str, record: ImageRecord) -> ImageTokens:
    """What became of the image tokens of one item; levels are worked out now, outside every timing."""
    level = record.rank() if record.rank else record.level
    return ImageTokens(
        lane=lane,
        item=item,
        share=[round(s, 4) for s in record.share],
        level=[round(x, 4) for x in level],
        group=record.group,
    )


def expert_load_event(lane: int, item: str, layers: list[list[float]]) -> ExpertLoad:
    """How the experts shared the tokens of one item, small enough to send."""
    return ExpertLoad(lane=lane, item=item, layers=[[round(share, 4) for share in layer] for layer in layers])
