"""Text to tokens and back: chat templates, streaming without broken characters."""

from __future__ import annotations

from typing import Any

from studio_state.errors import WorkloadError
from workers.session import Session
from workers.workloads.base import Item


def encode_item(session: Session, item: Item) -> tuple[str, list[int]]:
    """The prompt as the model sees it, and its token ids.

    Raises:
        WorkloadError: the prompt is empty.
    """
    tokenizer, spec = session.processor, session.spec
    if item.prompt_ids:
        ids = list(item.prompt_ids)
        return tokenizer.decode(ids), ids
    if not item.prompt:
        raise WorkloadError(f"item {item.id} has an empty prompt; give at least one character")
    if item.chat and spec.chat_template and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": item.prompt}]
        if spec.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": spec.system_prompt})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text, tokenizer(text, add_special_tokens=False)["input_ids"]
    text = item.prompt if spec.system_prompt is None else f"{spec.system_prompt}\n\n{item.prompt}"
    return text, tokenizer(text)["input_ids"]


class Streamer:
    """Token ids in, text out, never half a character."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = 0

    def put(self, ids: list[int], last: bool = False) -> str:
        """The text that became certain with these ids."""
        if not ids and not last:
            return ""
        self.ids += ids
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if text.endswith("�") and not last:
            return ""
        new, self.shown = text[self.shown :], len(text)
        if len(self.ids) > 64 and not text.endswith("�"):  # start over, so that decoding stays linear
            self.ids = self.ids[-8:]
            self.shown = len(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        return new
