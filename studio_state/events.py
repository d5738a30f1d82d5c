"""What happened: the events of one experiment, one JSON object a line.

The worker writes them, the dispatcher appends them to the spool, the store and the screen read
them. ``seq`` counts from 0 within an experiment. A kind that this version does not know is kept
as :class:`Unknown`, never dropped.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from studio_state.experiment import ExperimentSpec, MemoryEstimate, ModelInfo
from studio_state.metrics import Source

LaneStatus = Literal["finished", "failed", "cancelled", "refused", "unavailable"]


class Event(BaseModel):
    """Base: experiment id, sequence number, unix time in seconds."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    experiment: str = ""
    seq: int = -1
    t: float = Field(default_factory=time.time)

    def line(self) -> str:
        """The event as one JSON line, without the newline."""
        return self.model_dump_json()


class Hello(Event):
    """A worker is ready. ``unavailable`` maps method ids to the reason they cannot run here."""

    event: Literal["hello"] = "hello"
    device: str
    environment: dict[str, Any] = Field(default_factory=dict)
    unavailable: dict[str, str] = Field(default_factory=dict)
    free_bytes: int = 0


class Submitted(Event):
    """The experiment was accepted. ``owner`` identifies the session that may cancel it."""

    event: Literal["submitted"] = "submitted"
    spec: ExperimentSpec
    origin: str = "cli"
    owner: str = ""


class Started(Event):
    """The worker took it up. ``environment``: versions, device, threads, load of other processes."""

    event: Literal["started"] = "started"
    environment: dict[str, Any] = Field(default_factory=dict)


class ModelLoaded(Event):
    """Family, traits and size of the model, and what memory was expected."""

    event: Literal["model"] = "model"
    info: ModelInfo
    estimate: MemoryEstimate | None = None
    fits_baseline: bool = True


class Phase(Event):
    """Progress: which phase, of which lane, how much of it is done (0..1, None = unknown)."""

    event: Literal["phase"] = "phase"
    name: Literal["fetch", "load", "build", "warmup", "run", "quality", "memory", "score", "analyze"]
    lane: int | None = None
    done: float | None = None
    text: str = ""


class LaneStarted(Event):
    """A lane begins. ``order`` is its effective pipeline in one line."""

    event: Literal["lane"] = "lane"
    lane: int
    order: str
    interleaved: bool = True


class ItemStarted(Event):
    """A lane begins an item. ``prompt`` is the text the model sees, ``pieces`` its tokens as text."""

    event: Literal["item"] = "item"
    lane: int
    item: str
    index: int = 0
    of: int = 0
    repeat: int = 0
    prompt: str = ""
    pieces: list[str] = Field(default_factory=list)


class Tokens(Event):
    """New text of a lane. ``at`` are seconds since the item began, one per token."""

    event: Literal["tokens"] = "tokens"
    lane: int
    item: str
    repeat: int = 0
    ids: list[int] = Field(default_factory=list)
    text: str = ""
    at: list[float] = Field(default_factory=list)


class Metric(Event):
    """A value. Without ``item`` it describes the lane as a whole."""

    event: Literal["metric"] = "metric"
    lane: int
    name: str
    value: float | None
    source: Source = "measured"
    item: str | None = None
    repeat: int = 0
    n: int | None = None
    low: float | None = None
    high: float | None = None


class Ratio(Event):
    """Lane over reference with a 95 % interval, from interleaved pairs."""

    event: Literal["ratio"] = "ratio"
    lane: int
    name: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0


class Output(Event):
    """What an item ended in: its text, and whether it was right. ``data`` is workload-specific.

    ``label``: ``text`` is the class named; ``data`` has the likeliest ``labels`` and their ``probabilities``.
    ``image``: ``data`` has the ``image`` as a base64 PNG, and, where steps of its drawing took work from earlier ones,
    ``reused``: per step the share of it.
    """

    event: Literal["output"] = "output"
    lane: int
    item: str
    repeat: int = 0
    kind: Literal["text", "choice", "score", "image", "label"] = "text"
    text: str = ""
    expected: str | None = None
    correct: bool | None = None
    data: dict[str, Any] = Field(default_factory=dict)


class Kept(Event):
    """Which prompt tokens a lane still caches after the prefill (the eviction map).

    ``share`` has one number per prompt token: the share of (layer, KV head) pairs that kept it.
    ``layers`` holds per layer the mean over heads in tenths (0..9 as a digit string), for the map.
    """

    event: Literal["kept"] = "kept"
    lane: int
    item: str
    share: list[float]
    layers: list[str] = Field(default_factory=list)


class CacheFrame(BaseModel):
    """What every KV head held at one moment.

    Attributes:
        after: new tokens decided by then; 1 = the prompt has just been read.
        positions: columns: the prompt's tokens, then the new ones.
        held: bits as base64, a row a head (layer by layer), a column a position, each row filled up to whole bytes,
            highest bit first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    after: int
    positions: int
    held: str


class CacheMap(Event):
    """What every head of a lane's cache held of an item, at some moments of the answer. Not told where nothing was evicted.

    Attributes:
        heads: KV heads of each layer that has a cache.
        marked: prompt tokens that the answer needs (a needle) as [first, behind the last]; empty = not known.
        image: places of the image tokens in the prompt.
    """

    event: Literal["cache_map"] = "cache_map"
    lane: int
    item: str
    heads: list[int]
    frames: list[CacheFrame]
    marked: list[int] = Field(default_factory=list)
    image: list[int] = Field(default_factory=list)


class Picture(Event):
    """The image of an item, small enough to show, and where its image tokens lie. Told once an item.

    ``data`` is a base64 JPEG or PNG; ``width`` and ``height`` are those of the image the user gave, upright.
    ``boxes`` has one [left, top, right, bottom] per image token in ten-thousandths of the image, in the
    order in which the model reads them; a token without a place (a line break between tiles) has [].
    ``views`` says for each from which view it comes: 0 the whole image, 1.. its tiles.
    """

    event: Literal["picture"] = "picture"
    item: str
    mime: str = "image/jpeg"
    data: str = ""
    width: int = 0
    height: int = 0
    boxes: list[list[int]] = Field(default_factory=list)
    views: list[int] = Field(default_factory=list)


class ImageTokens(Event):
    """What a lane did with the image tokens of an item, in the order of :class:`Picture`.

    ``share``: how much of the model worked on the token (1 = all its layers, 0 = dropped before the first).
    ``level``: the smallest ``keep`` at which this lane's policy would keep the token; empty if it has none.
    ``group``: tokens with the same number were merged into one; empty if none were.
    """

    event: Literal["image_tokens"] = "image_tokens"
    lane: int
    item: str
    share: list[float]
    level: list[float] = Field(default_factory=list)
    group: list[int] = Field(default_factory=list)


class ExpertLoad(Event):
    """How the experts of a model shared the tokens of an item: per decoder layer each expert's share of the visits.

    A layer without experts has []; an expert that nobody visited, or that a policy took out, has 0.
    """

    event: Literal["expert_load"] = "expert_load"
    lane: int
    item: str
    layers: list[list[float]]


class Analysis(Event):
    """What an analyzer found of a lane, as plain data: ``runtime-dissection`` and ``llm-viewer`` say why it is as fast as it is."""

    event: Literal["analysis"] = "analysis"
    lane: int
    analyzer: str
    data: dict[str, Any] = Field(default_factory=dict)


class Preview(Event):
    """What a picture looks like on its way from noise. ``step`` steps of ``of`` are done; ``data`` is a base64 PNG."""

    event: Literal["preview"] = "preview"
    lane: int
    item: str
    repeat: int = 0
    step: int
    of: int
    data: str = ""


class LaneFinished(Event):
    """A lane ended. ``flags`` are plain sentences such as ``no effect: ...``."""

    event: Literal["lane_finished"] = "lane_finished"
    lane: int
    status: LaneStatus
    flags: list[str] = Field(default_factory=list)
    message: str = ""
    interleaved: bool = True


class Note(Event):
    """Something worth knowing that changes no result."""

    event: Literal["note"] = "note"
    text: str
    level: Literal["info", "warning"] = "info"
    lane: int | None = None


class Finished(Event):
    """The experiment ended by itself; single lanes may have failed."""

    event: Literal["finished"] = "finished"
    seconds: float = 0.0


class Failed(Event):
    """The experiment ended with an error. ``detail`` is for the log, ``message`` for the person."""

    event: Literal["failed"] = "failed"
    message: str
    phase: str = ""
    problems: list[dict[str, Any]] = Field(default_factory=list)
    detail: str = ""


class Cancelled(Event):
    """The experiment was cancelled; what was measured before stays."""

    event: Literal["cancelled"] = "cancelled"
    message: str = "cancelled"


class Unknown(Event):
    """An event kind this version does not know, kept whole."""

    model_config = ConfigDict(frozen=True, extra="allow")
    event: str


AnyEvent = Annotated[
    Hello | Submitted | Started | ModelLoaded | Phase | LaneStarted | ItemStarted | Tokens | Metric | Ratio | Output
    | Kept | CacheMap | Picture | ImageTokens | ExpertLoad | Analysis | Preview | LaneFinished | Note | Finished | Failed | Cancelled,
    Field(discriminator="event"),
]  # fmt: skip
_adapter: TypeAdapter[Any] = TypeAdapter(AnyEvent)
TERMINAL = ("finished", "failed", "cancelled")


def decode(line: str | bytes) -> Event:
    """Read one line.

    Raises:
        ValueError: the line is not a JSON object with ``event`` (a torn or foreign line).
    """
    data = json.loads(line)
    if not isinstance(data, dict) or not isinstance(data.get("event"), str):
        raise ValueError("not an event line")
    try:
        event: Event = _adapter.validate_python(data)
        return event
    except ValidationError as e:
        if any(x["type"] == "union_tag_invalid" for x in e.errors()):
            return Unknown.model_validate(data)
        raise ValueError(f"bad {data['event']} event: {e.errors()[0]['msg']}") from e
