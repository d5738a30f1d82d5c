"""What a workload is: items to run, and how their results are scored.

One file a workload. Its fields are the options (bounded, with help); its class attribute ``card``
describes it; the engine runs the items and hands back what happened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from studio_state.catalog import WorkloadCard
from workers.cards import Declared
from workers.data.pictures import Picture


@dataclass(frozen=True)
class Item:
    """One thing to run.

    Attributes:
        id: stable within the workload and its options.
        prompt: what the model is given (before any chat template).
        task: ``generate`` new tokens; ``score`` the continuation's likelihood by the decode path;
            ``choose`` the likeliest of several continuations; ``classify`` an image; ``draw`` one from noise.
        image: what the model is shown, where it can see.
        chat: wrap the prompt in the chat template, where the model has one and the spec allows it.
        continuations: texts to score; one for ``score``, several for ``choose``.
        prompt_ids, continuation_ids: token ids instead of text, where the workload cuts by tokens.
        expected: the right answer, for display and grading.
        max_new_tokens: the workload's own default for ``generate``.
        ignore_eos: always generate exactly ``max_new_tokens``.
        data: whatever the grader needs.
    """

    id: str
    prompt: str = ""
    task: Literal["generate", "score", "choose", "classify", "draw"] = "generate"
    image: Picture | None = None
    chat: bool = True
    continuations: tuple[str, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    continuation_ids: tuple[tuple[int, ...], ...] = ()
    expected: str | None = None
    max_new_tokens: int = 64
    ignore_eos: bool = False
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class ItemResult:
    """What one lane made of one item.

    Attributes:
        text: generated text (``generate``).
        token_ids: generated token ids.
        nll: per continuation the negative log-likelihood of each of its tokens, in nats.
        prompt_ids: the prompt as the model saw it.
        ranked: classes and their probabilities, the likeliest first (``classify``).
        drawn: the picture that was made, [C, H, W] from 0 to 1 (``draw``).
        data: what else came out, for the screen.
    """

    item: Item
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    nll: list[list[float]] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    ranked: list[tuple[str, float]] = field(default_factory=list)
    drawn: Any = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grade:
    """How a result is judged.

    Attributes:
        correct: None where there is no right answer.
        text: the answer to show (the chosen text for ``choose``).
        metrics: per-item metrics, names from ``studio_state.metrics``.
        data: workload-specific details kept with the output.
    """

    correct: bool | None = None
    text: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ItemContext:
    """What a workload may use to make its items.

    Attributes:
        tokenizer: the model's tokenizer (transformers), for families that have one.
        seed: the experiment's seed; the same seed gives the same items.
        context: the longest input the model was made for, in tokens (0 = unknown).
        labels: names of the classes that the model tells apart, for classifiers.
    """

    tokenizer: Any
    seed: int = 0
    context: int = 0
    labels: tuple[str, ...] = ()


class Workload(Declared, ABC):
    """Base class. Subclasses are found by file; no list to edit."""

    card: ClassVar[WorkloadCard]

    @abstractmethod
    def make_items(self, ctx: ItemContext) -> list[Item]:
        """The items, the same for every lane.

        Raises:
            WorkloadError: the options name something that cannot be read or made.
        """

    def grade(self, result: ItemResult) -> Grade:
        """Judge one result. The default has no right answer."""
        return Grade(text=result.text)

    def summarize(self, results: Sequence[ItemResult]) -> dict[str, float]:
        """Metrics of a whole lane that are not means of item metrics (for example perplexity)."""
        return {}

    @classmethod
    def describe(cls) -> WorkloadCard:
        """The card completed with summary and option schema from the class."""
        return cls.card.model_copy(update={"summary": cls.card.summary or cls.summary_line(), "options": cls.knob_schema()})
