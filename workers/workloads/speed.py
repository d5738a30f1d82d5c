"""Speed alone: a fixed number of prompt tokens in, a fixed number of new tokens out."""

from __future__ import annotations

from typing import ClassVar

from studio_state.catalog import WorkloadCard
from workers.cards import knob
from workers.workloads.base import Item, ItemContext, Workload
from workers.workloads.detects import means
from workers.workloads.texts import novel
from workers.workloads.tokens import encode, prefix_ids, require_room


class Speed(Workload):
    """Repeats one prompt of fixed length and always generates the same number of tokens, end-of-sequence ignored."""

    card: ClassVar[WorkloadCard] = WorkloadCard(
        id="speed",
        title="Speed",
        families=("llm", "vlm"),
        metrics=("first_divergence", "same_output"),
        detects=means("repetitions", "speed", (5, 20, 50), scatter=0.03, unit="single ratios to the reference"),
    )
    items: int = knob(5, ge=1, le=1000, help="repetitions; more = narrower intervals of the ratios")
    prompt_tokens: int = knob(256, ge=4, le=131_072, fits="context", help="prompt length in tokens, cut from the packaged novel")
    new_tokens: int = knob(64, ge=1, le=32_768, help="tokens generated in every repetition")

    def make_items(self, ctx: ItemContext) -> list[Item]:
        """``items`` times the same prompt of exactly ``prompt_tokens`` ids (the tokenizer's prefix included).

        Raises:
            WorkloadError: prompt and new tokens together are longer than the model's context.
        """
        require_room(ctx, self.prompt_tokens + self.new_tokens, "prompt_tokens + new_tokens", "lower one of them")
        ids = prefix_ids(ctx.tokenizer)
        while len(ids) < self.prompt_tokens:
            ids = ids + encode(ctx.tokenizer, novel()[: 8 * self.prompt_tokens])
        ids = ids[: self.prompt_tokens]
        text = ctx.tokenizer.decode(ids, skip_special_tokens=True)
        return [
            Item(
                id=f"repetition-{i}",
                prompt=text,
                chat=False,
                prompt_ids=tuple(ids),
                max_new_tokens=self.new_tokens,
                ignore_eos=True,
            )
            for i in range(self.items)
        ]
