"""Which sentence comes next: likelihoods of several continuations, scored by the decode path."""

from __future__ import annotations

import math
import random
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

from studio_state.catalog import WorkloadCard
from studio_state.errors import WorkloadError
from workers.cards import knob
from workers.workloads.base import Grade, Item, ItemContext, ItemResult, Workload
from workers.workloads.detects import accuracies
from workers.workloads.texts import Sentence, novel_sentences, passage
from workers.workloads.tokens import require_room, split_at_boundary

SHORTEST, LONGEST = 40, 120  # characters of a sentence offered as a choice
SIMILAR = 0.15  # lengths of the choices differ from the right one's by at most this share
APART = 50  # sentences between the right choice and any other


class MultipleChoice(Workload):
    """Asks which of several sentences of the novel follows a passage; the likeliest one per token is the answer.

    The wrong choices are sentences of similar length from elsewhere in the novel. Guessing is right
    in 1 of ``choices`` cases.
    """

    card: ClassVar[WorkloadCard] = WorkloadCard(
        id="multiple-choice",
        title="Next sentence",
        families=("llm", "vlm"),
        metrics=("accuracy", "nll"),
        detects=accuracies("questions", (20, 200, 1000)) + " Guessing is right in 1 of 4 (1 of choices).",
        chance=0.25,
    )
    items: int = knob(20, ge=1, le=1000, help="number of questions; more = smaller differences show, longer run")
    choices: int = knob(4, ge=2, le=8, help="sentences to choose from; guessing is right in 1 of them")
    context: int = knob(
        6, ge=1, le=400, help="sentences of the novel before the question; more = more for cache policies to lose"
    )

    def make_items(self, ctx: ItemContext) -> list[Item]:
        """Questions drawn by the seed; fewer items are a beginning of more.

        Raises:
            WorkloadError: the novel has fewer questions with so long a context, or one exceeds the model's context.
        """
        questions = [s for s in choosable() if _room_before(s) >= self.context]
        if len(questions) < self.items:
            raise WorkloadError(
                f"items={self.items} with context={self.context}: the packaged novel has only {len(questions)} such questions; "
                "lower items or context"
            )
        order = random.Random(f"multiple-choice {ctx.seed}").sample(questions, len(questions))
        return [self._item(sentence, ctx) for sentence in order[: self.items]]

    def _item(self, right: Sentence, ctx: ItemContext) -> Item:
        rng = random.Random(f"choices {ctx.seed} {right.index}")
        chosen = [right, *self._others(right, rng)]
        rng.shuffle(chosen)
        prompt = passage(right.index - self.context, right.index)
        continuations = tuple(f" {s.text}" for s in chosen)
        prompt_ids, continuation_ids = split_at_boundary(ctx.tokenizer, prompt, continuations)
        longest = len(prompt_ids) + max(map(len, continuation_ids))
        require_room(ctx, longest, f"a question with context={self.context} sentences", "lower context")
        return Item(
            id=f"sentence-{right.index}",
            prompt=prompt,
            task="choose",
            chat=False,
            continuations=continuations,
            prompt_ids=tuple(prompt_ids),
            continuation_ids=tuple(map(tuple, continuation_ids)),
            expected=right.text,
            data={"right": chosen.index(right), "chance": 1 / self.choices, "chapter": right.chapter},
        )

    def _others(self, right: Sentence, rng: random.Random) -> list[Sentence]:
        """Wrong choices: similar length, not from the neighbourhood, no text twice."""
        margin = SIMILAR * len(right.text)
        texts = {right.text}
        pool = []
        for s in choosable():
            similar = abs(len(s.text) - len(right.text)) <= margin
            if similar and abs(s.index - right.index) > max(APART, self.context) and s.text not in texts:
                pool.append(s)
                texts.add(s.text)
        return rng.sample(pool, self.choices - 1)

    def grade(self, result: ItemResult) -> Grade:
        """The choice with the lowest mean NLL per token (the first of equal ones) against the right one."""
        means = [_mean(nll) for nll in result.nll]
        data: dict[str, Any] = {**result.item.data, "mean_nll": means}
        finite = [i for i, m in enumerate(means) if math.isfinite(m)]
        if not finite:
            return Grade(correct=False, metrics={"accuracy": 0.0}, data={**data, "chosen": None})
        chosen = min(finite, key=lambda i: means[i])
        right = result.item.data["right"]
        correct = chosen == right
        metrics = {"accuracy": float(correct)} | ({"nll": means[right]} if right in finite else {})
        return Grade(
            correct=correct, text=result.item.continuations[chosen].strip(), metrics=metrics, data={**data, "chosen": chosen}
        )


def _mean(values: list[float]) -> float:
    """Mean, or infinity of nothing."""
    return math.fsum(values) / len(values) if values else math.inf


@cache
def choosable() -> tuple[Sentence, ...]:
    """Sentences that can be a choice: neither short nor long, no quotation marks, and in the middle of a paragraph.

    Quotation marks and paragraph breaks would give the right choice away by its form.
    """
    everything = novel_sentences()
    return tuple(
        s
        for before, s in pairwise(everything)
        if before.paragraph == s.paragraph and SHORTEST <= len(s.text) <= LONGEST and '"' not in s.text
    )


def _room_before(sentence: Sentence) -> int:
    """Sentences of the same chapter before this one."""
    return sentence.index - _chapter_starts()[sentence.chapter]


@cache
def _chapter_starts() -> dict[int, int]:
    """Chapter -> index of its first sentence."""
    starts: dict[int, int] = {}
    for s in novel_sentences():
        starts.setdefault(s.chapter, s.index)
    return starts
