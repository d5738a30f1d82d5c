"""Token arithmetic of workloads: prefixes, exact cuts, boundaries, room in the model's context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from studio_state.errors import WorkloadError
from workers.workloads.base import ItemContext


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, nothing added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prefix_ids(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer puts before every text (begin-of-sequence for Llama and Gemma, nothing for SmolLM2)."""
    bare = encode(tokenizer, "a")
    full = list(tokenizer("a", verbose=False)["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def template_tokens(tokenizer: Any) -> int:
    """Tokens that the model's chat template (or the prefix, where it has none) puts around a prompt."""
    if not getattr(tokenizer, "chat_template", None):
        return len(prefix_ids(tokenizer))
    message = [{"role": "user", "content": "a"}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return len(encode(tokenizer, text)) - len(encode(tokenizer, "a"))


def split_at_boundary(tokenizer: Any, prompt: str, continuations: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt and of each continuation as the joined text is tokenised.

    A continuation brings its own leading space. Where a tokenizer merges characters across the
    boundary, the merged token counts to the continuation, in all of them alike.

    Returns:
        prompt ids with the tokenizer's prefix, and one id list per continuation.
    """
    head = encode(tokenizer, prompt)
    joined = [encode(tokenizer, prompt + c) for c in continuations]
    shared = min(_common(head, ids) for ids in joined)
    return prefix_ids(tokenizer) + head[:shared], [ids[shared:] for ids in joined]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def require_room(ctx: ItemContext, tokens: int, what: str, advice: str) -> None:
    """Refuse what is longer than the model's context (a context of 0 is unknown and lets everything pass).

    Args:
        tokens: all that must fit: prompt, template, answer.
        what: begins the sentence: ``prompt 3 of prompts.csv``.
        advice: what to do.

    Raises:
        WorkloadError: it does not fit.
    """
    if ctx.context and tokens > ctx.context:
        raise WorkloadError(f"{what} needs {tokens:,} tokens, but the model's context is {ctx.context:,}; {advice}")
