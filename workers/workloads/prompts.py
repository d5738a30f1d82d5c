"""Prompts of one's own: how far does a policy move the answers away from the baseline's?"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from studio_state.catalog import WorkloadCard, asset
from studio_state.errors import WorkloadError
from workers.cards import knob
from workers.workloads.base import Grade, Item, ItemContext, ItemResult, Workload
from workers.workloads.detects import accuracies
from workers.workloads.tables import Row, read_rows, require_columns
from workers.workloads.texts import refuse_binary
from workers.workloads.tokens import encode, require_room, template_tokens


class Prompts(Workload):
    """Runs one prompt, a file of prompts, or a packaged handful, and compares every answer with the baseline's.

    The engine measures the distance (KL, top-1 agreement, first divergence). Where the right answer
    is known, a text is correct if it contains that answer as whole words, whatever the case.
    """

    card: ClassVar[WorkloadCard] = WorkloadCard(
        id="prompts",
        title="Prompts",
        families=("llm", "vlm"),
        metrics=("kl_to_baseline", "top1_agreement", "first_divergence", "same_output", "accuracy"),
        detects="KL and top-1 agreement are measured at every token and show small shifts from one prompt on. "
        + accuracies("prompts with a known answer", (20, 100)),
    )
    items: int = knob(8, ge=1, le=10_000, help="at most so many prompts are run, from the top of the file")
    text: str | None = knob(None, help="the prompt itself, instead of a file")
    file: str = knob(
        "", max_length=4096, help="JSONL, CSV, TSV (with columns) or TXT (one prompt a line); empty = packaged prompts"
    )
    prompt_column: str = knob("prompt", min_length=1, max_length=200, help="column that holds the prompt")
    answer_column: str = knob("", max_length=200, help="column that holds the right answer; empty = answers are not graded")

    def make_items(self, ctx: ItemContext) -> list[Item]:
        """The prompts in the order given, the first ``items`` of them.

        Raises:
            WorkloadError: text and file both given, an empty or binary prompt, a file that cannot be used, or a
                prompt longer than the model's context.
        """
        items = self._from_text() if self.text is not None else self._from_file()
        around = template_tokens(ctx.tokenizer) + 1  # room for at least one new token
        for item in items:
            tokens = len(encode(ctx.tokenizer, item.prompt))
            require_room(ctx, tokens + around, f"{item.data['source']} with the chat template", "shorten the prompt")
        return items

    def _from_text(self) -> list[Item]:
        text = self.text or ""
        if self.file:
            raise WorkloadError("both text and file are given; give one of them")
        if not text.strip():
            raise WorkloadError("the prompt is empty; write some text")
        refuse_binary(text, "the prompt")
        return [Item(id="text", prompt=text, data={"source": "the prompt"})]

    def _from_file(self) -> list[Item]:
        path = self.file or str(asset("workloads/prompts.jsonl"))
        prompts, answers = (self.prompt_column, self.answer_column) if self.file else ("prompt", "answer")
        rows = read_rows(path, prompts)
        require_columns(path, rows, [c for c in (prompts, answers) if c])
        name = repr(self.file) if self.file else "the packaged prompts"
        return [_item(row, name, prompts, answers) for row in rows[: self.items]]

    def grade(self, result: ItemResult) -> Grade:
        """Correct if the right answer is in the text; no judgement where none is known."""
        expected = result.item.expected
        if expected is None:
            return Grade(text=result.text)
        correct = contains(result.text, expected)
        return Grade(correct=correct, text=result.text, metrics={"accuracy": float(correct)})


def _item(row: Row, name: str, prompts: str, answers: str) -> Item:
    """One row as an item.

    Raises:
        WorkloadError: its prompt is missing, not text, blank or binary, or its answer is not text or a number.
    """
    source = f"line {row.line} of {name}"
    prompt, answer = row.cells.get(prompts), row.cells.get(answers) if answers else None
    if not isinstance(prompt, str):
        raise WorkloadError(f"{source} has no text in column {prompts!r}; every row needs a prompt")
    if not prompt.strip():
        raise WorkloadError(f"{source} has an empty prompt; write some text or remove the line")
    refuse_binary(prompt, source)
    return Item(id=f"line-{row.line}", prompt=prompt, expected=_answer(answer, source, answers), data={"source": source})


def _answer(value: Any, source: str, column: str) -> str | None:
    if value is None or isinstance(value, str):
        return (value or "").strip() or None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise WorkloadError(f"{source} has {type(value).__name__} in column {column!r}; an answer is text or a number")


def contains(text: str, answer: str) -> bool:
    """True if the answer stands in the text as whole words; case and white space do not matter."""
    words, wanted = " ".join(text.casefold().split()), " ".join(answer.casefold().split())
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", words) is not None
