"""Perplexity by the decode path: a cut cache or rounded weights show up as lost likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from studio_state.catalog import WorkloadCard
from studio_state.errors import WorkloadError
from workers.cards import knob
from workers.workloads.base import Grade, Item, ItemContext, ItemResult, Workload
from workers.workloads.detects import means
from workers.workloads.texts import novel, read_text_file
from workers.workloads.tokens import encode, prefix_ids, require_room


class Perplexity(Workload):
    """Prefills windows of a text, lets the policies act, then scores what follows token by token.

    The windows lie evenly over the whole text and depend on nothing but the options, so perplexities
    of different runs and seeds compare. One forward over the text could not see a cache policy at all.
    """

    card: ClassVar[WorkloadCard] = WorkloadCard(
        id="perplexity",
        title="Perplexity",
        families=("llm", "vlm"),
        metrics=("perplexity", "nll"),
        detects=means("windows", "perplexity", (8, 32, 100), scatter=0.05, unit="the windows' ratios to the reference"),
    )
    items: int = knob(8, ge=1, le=10_000, help="number of windows; more = smaller differences show, longer run")
    context: int = knob(
        512, ge=8, le=131_072, fits="context", help="tokens prefilled before scoring; longer = more for cache policies to lose"
    )
    score: int = knob(64, ge=1, le=8192, help="tokens scored after each context, by the decode path")
    file: str = knob("", max_length=4096, help="path of a UTF-8 text to use instead of the packaged novel")

    def make_items(self, ctx: ItemContext) -> list[Item]:
        """Windows of exactly ``context`` prompt ids (the tokenizer's prefix included) and ``score`` ids to score.

        Raises:
            WorkloadError: the file cannot be used, is too short, or a window is longer than the model's context.
        """
        advice = "lower the options context or score"
        require_room(ctx, self.context + self.score, "a window (context + score)", advice)
        prefix = prefix_ids(ctx.tokenizer)
        ids = encode(ctx.tokenizer, read_text_file(self.file) if self.file else novel())
        body = self.context - len(prefix)
        return [self._window(i, start, ids, prefix, body, ctx.tokenizer) for i, start in enumerate(self._starts(len(ids), body))]

    def _window(self, number: int, start: int, ids: list[int], prefix: list[int], body: int, tokenizer: Any) -> Item:
        cut = start + body
        prompt, scored = ids[start:cut], ids[cut : cut + self.score]
        return Item(
            id=f"window-{number}",
            prompt=tokenizer.decode(prompt),
            task="score",
            chat=False,
            continuations=(tokenizer.decode(scored),),
            prompt_ids=tuple(prefix + prompt),
            continuation_ids=(tuple(scored),),
            data={"start": start, "scored_from": cut, "text_tokens": len(ids)},
        )

    def _starts(self, tokens: int, body: int) -> list[int]:
        """First token of each window: evenly from the start to the end of the text, scored parts never overlapping."""
        room = tokens - (body + self.score)
        most = room // self.score + 1 if room >= 0 else 0
        if most < self.items:
            fits = f"at most {most} items fit" if most else "not even one item fits; lower context or score"
            raise WorkloadError(
                f"the text of {self.file or 'the packaged novel'} has {tokens:,} tokens: too short for {self.items} windows of "
                f"{self.context} + {self.score} tokens whose scored parts do not overlap; {fits}, or give a longer text"
            )
        return [i * room // max(self.items - 1, 1) for i in range(self.items)]

    def grade(self, result: ItemResult) -> Grade:
        """Mean NLL per token of the window; there is no right answer."""
        scored = [x for nll in result.nll for x in nll]
        return Grade(metrics={"nll": sum(scored) / len(scored)} if scored else {})

    def summarize(self, results: Sequence[ItemResult]) -> dict[str, float]:
        """``perplexity`` = exp(sum of all NLLs / number of scored tokens)."""
        scored = [x for result in results for nll in result.nll for x in nll]
        if not scored:
            return {}
        mean = math.fsum(scored) / len(scored)
        return {"perplexity": math.exp(mean) if mean < 700 else math.inf}  # exp(710) overflows
