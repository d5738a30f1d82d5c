"""A number hidden in a long text: what a cache policy threw away cannot be answered."""

from __future__ import annotations

import random
import re
from typing import Any, ClassVar

from studio_state.catalog import WorkloadCard
from studio_state.errors import WorkloadError
from workers.cards import knob
from workers.workloads.base import Grade, Item, ItemContext, ItemResult, Workload
from workers.workloads.detects import accuracies
from workers.workloads.texts import Sentence, novel_sentences
from workers.workloads.tokens import encode, require_room, template_tokens

CITIES = (
    "Amsterdam", "Athens", "Bangkok", "Barcelona", "Berlin", "Bogota", "Budapest", "Cairo", "Chicago", "Copenhagen",
    "Dakar", "Dublin", "Florence", "Geneva", "Hamburg", "Helsinki", "Istanbul", "Jakarta", "Kyoto", "Lima", "Lisbon",
    "Madrid", "Manila", "Montreal", "Moscow", "Mumbai", "Munich", "Nairobi", "Naples", "Oslo", "Prague", "Quito",
    "Rome", "Santiago", "Seoul", "Singapore", "Stockholm", "Sydney", "Tokyo", "Toronto", "Vienna", "Warsaw",
)  # fmt: skip
INTRO = "There is a secret number hidden in the following text. Find it and remember it.\n\n"
QUESTION = "\n\nWhat is the secret number for {city}? Answer with the number."
NEEDLE = "The secret number for {city} is {number}."
CUT = " ..."
ANSWER_TOKENS = 16


class Needle(Workload):
    """Hides "The secret number for CITY is NNNN" in a passage of the novel and asks for it at the end.

    The passage, the city and the number come from the seed. ``length`` counts the tokens of the prompt
    text; the model's chat template comes on top.
    """

    card: ClassVar[WorkloadCard] = WorkloadCard(
        id="needle",
        title="Needle in a novel",
        families=("llm", "vlm"),
        metrics=("accuracy", "kl_to_baseline", "top1_agreement", "first_divergence", "same_output"),
        detects=accuracies("needles", (12, 40, 100)),
    )
    items: int = knob(12, ge=1, le=2000, help="number of needles; more = smaller losses show, longer run")
    length: int = knob(512, ge=64, le=131_072, fits="context", help="prompt length in tokens, before the chat template")
    depth: float | None = knob(
        None, ge=0, le=1, help="share of the passage before the needle: 0 = start, 1 = end; empty = spread evenly over the items"
    )

    def make_items(self, ctx: ItemContext) -> list[Item]:
        """Prompts of at most ``length`` tokens, short of it by a few at the most.

        Raises:
            WorkloadError: ``length`` is shorter than needle and question, or longer than the model's context allows.
        """
        around = template_tokens(ctx.tokenizer) + ANSWER_TOKENS
        room = ctx.context - around
        require_room(
            ctx, self.length + around, f"length={self.length} with chat template and answer", f"set length to at most {room}"
        )
        rng = random.Random(f"needle {ctx.seed}")
        return [self._item(i, rng, ctx.tokenizer) for i in range(self.items)]

    def _item(self, number: int, rng: random.Random, tokenizer: Any) -> Item:
        depth = self.depth if self.depth is not None else number / max(self.items - 1, 1)
        city, secret, start = rng.choice(CITIES), str(rng.randint(1000, 9999)), rng.randrange(len(novel_sentences()))
        hay = _Haystack(start, NEEDLE.format(city=city, number=secret), QUESTION.format(city=city), depth)
        words = self._fitting_words(hay, tokenizer)
        prompt, span = hay.prompt(words)
        passage = len(prompt) - len(INTRO) - len(hay.question) - (span[1] - span[0])
        return Item(
            id=f"needle-{number}",
            prompt=prompt,
            expected=secret,
            max_new_tokens=ANSWER_TOKENS,
            data={
                "needle_span": list(span),
                "city": city,
                "depth": depth,
                "depth_found": (span[0] - len(INTRO)) / passage,
                "prompt_tokens": len(encode(tokenizer, prompt)),
            },
        )

    def _fitting_words(self, hay: _Haystack, tokenizer: Any) -> int:
        """The most words of the novel with which the prompt is not longer than ``length`` tokens."""

        def tokens(words: int) -> int:
            return len(encode(tokenizer, hay.prompt(words)[0]))

        low, high = 1, self.length  # a word is at least one token
        if tokens(low) > self.length:
            raise WorkloadError(
                f"length={self.length} has no room for a passage: needle and question alone take {tokens(low)} tokens "
                f"with this tokenizer; set length to at least {2 * tokens(low)}"
            )
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if tokens(middle) <= self.length else (low, middle - 1)
        return low

    def grade(self, result: ItemResult) -> Grade:
        """Correct if the first number of as many digits as the secret has is the secret."""
        expected = result.item.expected or ""
        answer = first_number(result.text, len(expected))
        correct = answer == expected
        return Grade(correct=correct, text=result.text, metrics={"accuracy": float(correct)}, data={"answer": answer})


class _Haystack:
    """Sentences of the novel from ``start`` on (past the end it begins again) with a needle at a sentence boundary."""

    def __init__(self, start: int, needle: str, question: str, depth: float):
        everything = novel_sentences()
        self.sentences: tuple[Sentence, ...] = everything[start:] + everything[:start]
        self.needle, self.question, self.depth = needle, question, depth

    def prompt(self, words: int) -> tuple[str, tuple[int, int]]:
        """The prompt with ``words`` words of the novel, and the characters that the needle takes in it."""
        pieces = self._pieces(words)
        before = self._boundary(pieces)
        text, end = INTRO, 0
        for i, piece in enumerate((*pieces[:before], self.needle, *pieces[before:])):
            text += (" " if i else "") + piece
            end = len(text) if i == before else end
        return text + self.question, (end - len(self.needle), end)

    def _pieces(self, words: int) -> list[str]:
        """Whole sentences, the last one cut short (and marked) where the words run out."""
        pieces: list[str] = []
        at = 0
        while words > 0:
            parts = self.sentences[at % len(self.sentences)].text.split(" ")
            pieces.append(" ".join(parts[:words]) + (CUT if words < len(parts) else ""))
            words, at = words - len(parts), at + 1
        return pieces

    def _boundary(self, pieces: list[str]) -> int:
        """Number of sentences before the needle that brings it closest to ``depth``, measured in characters."""
        ends = [0]
        for piece in pieces:
            ends.append(ends[-1] + len(piece) + 1)
        wanted = self.depth * ends[-1]
        return min(range(len(ends)), key=lambda i: abs(ends[i] - wanted))


def first_number(text: str, digits: int) -> str | None:
    """The first number of exactly ``digits`` digits; commas between thousands do not count."""
    numbers = (n.replace(",", "") for n in re.findall(r"\d+(?:,\d{3})*", text))
    return next((n for n in numbers if len(n) == digits), None)
