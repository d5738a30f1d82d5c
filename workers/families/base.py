"""What the engine asks of a model family. Small on purpose: four families are planned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from workers.session import Session
from workers.workloads.base import Item, ItemResult

if TYPE_CHECKING:
    from studio_state.events import CacheFrame
    from workers.families.image_layout import ImageLayout
    from workers.mechanisms.visual_tokens import ImageRecord


@dataclass
class StepResult:
    """One step of a run: the prefill, a decode step, later a denoising step or an image.

    Attributes:
        kind: ``prefill`` or ``step``; of a diffusion pipeline ``encode``, ``step`` or ``decode``.
        seconds: time of this step alone; work between steps (events) is not in it.
        new: per row of the batch the units this step added (token ids).
        text: per row the text that became certain with this step.
        pictures: what the first rows look like on the way, as base64 PNGs.
        place: denoising steps done, and how many there are.
    """

    kind: str
    seconds: float
    new: list[list[int]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    place: tuple[int, int] = (0, 0)


@dataclass
class SeenImage:
    """An image as a model takes it.

    Attributes:
        inputs: by the library's names, as the processor gives them for this one image.
        layout: where its tokens lie.
        shown: the small copy for the screen, as :func:`workers.data.pictures.shown` gives it.
        seed: for policies that draw image tokens.
        asked: the words that came with it, without the chat form.
    """

    inputs: dict[str, Any]
    layout: ImageLayout
    shown: dict[str, Any]
    seed: int = 0
    asked: str = ""


@dataclass
class RunTrace:
    """What one lane did with one batch of items.

    Attributes:
        steps: timings in order; the first is the prefill.
        results: one a row.
        counts: metric name -> value, counted during the run.
        logits: what the quality comparison needs, per row (float32 log-probabilities [n, V]).
        features: per row what models give that name no classes: a vector, or a map as one.
        drawn: per row the picture that was made, [C, H, W] from 0 to 1.
        images: per row its image as the model takes it (None: there is none).
        seen: per row what became of its image tokens.
        kept: per row and layer the share of KV heads that kept each prompt token, [layers][tokens].
        frames: per row what every head of its cache held at some moments; heads: KV heads of each layer.
        experts: per row and layer each expert's share of the visits, [layers][experts]; empty for models without experts.
    """

    items: Sequence[Item]
    results: list[ItemResult]
    steps: list[StepResult] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    logits: list[Any] = field(default_factory=list)
    features: list[Any] = field(default_factory=list)
    drawn: list[Any] = field(default_factory=list)
    images: list[SeenImage | None] = field(default_factory=list)
    seen: list[ImageRecord] = field(default_factory=list)
    kept: list[list[list[float]]] = field(default_factory=list)
    frames: list[list[CacheFrame]] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    experts: list[list[list[float]]] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    pieces: list[list[str]] = field(default_factory=list)


class Family(Protocol):
    """Load a model, name its parts, step through items, compare two lanes' results."""

    id: str

    def backbone(self, model: nn.Module) -> Any:
        """The transformer itself, without what is built on top of it."""
        ...

    def warm_up_item(self, session: Session, like: Item) -> Item:
        """What to warm up on, before an item like this one."""
        ...

    def probe(self, session: Session, item: Item) -> RunTrace:
        """A trace with a few distributions, to be looked at before anything is timed."""
        ...

    def parts(self, model: nn.Module) -> dict[str, list[str]]:
        """Qualified names of the model's ``layers``, ``attentions`` and ``linears`` (those policies may replace), and ``vision_...`` where it sees."""
        ...

    def begin(self, session: Session, items: Sequence[Item]) -> RunTrace:
        """Everything about a batch that is known before it runs (prompt texts and their pieces)."""
        ...

    def run(self, session: Session, trace: RunTrace) -> Iterator[StepResult]:
        """Run a batch under the attached policies, filling the trace."""
        ...

    def follow(self, session: Session, items: Sequence[Item], reference: RunTrace) -> RunTrace:
        """Untimed: the lane's distributions on the reference's output (teacher-forced)."""
        ...

    def compare(self, reference: RunTrace, lane: RunTrace) -> list[dict[str, float]]:
        """Per row: how far the lane's distributions and outputs are from the reference's."""
        ...
