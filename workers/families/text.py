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
    text = chat_text(session, item)
    templated = item.chat and spec.chat_template and bool(template_of(session))
    return text, tokenizer(text, **{"add_special_tokens": False} if templated else {})["input_ids"]


def template_of(session: Session) -> Any:
    """Who writes a chat: the image processor where it has a template, else the tokenizer; None if neither has one."""
    return next((x for x in (session.images, session.processor) if getattr(x, "chat_template", None)), None)


def chat_text(session: Session, item: Item, images: int = 0) -> str:
    """The prompt as text: in the model's chat form where it has one and the spec allows it.

    Args:
        images: so many pictures stand before the words.

    Raises:
        WorkloadError: the prompt is empty.
    """
    spec, writer = session.spec, template_of(session)
    if not item.prompt:
        raise WorkloadError(f"item {item.id} has an empty prompt; give at least one character")
    if not (item.chat and spec.chat_template and writer):
        text = item.prompt if spec.system_prompt is None else f"{spec.system_prompt}\n\n{item.prompt}"
        return f"{session.images.image_token * images}\n{text}" if images else text
    parts = session.images is not None  # chats of models that see are lists of parts
    content = [*([{"type": "image"}] * images), {"type": "text", "text": item.prompt}] if parts else item.prompt
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if spec.system_prompt is not None:
        system = [{"type": "text", "text": spec.system_prompt}] if parts else spec.system_prompt
        messages.insert(0, {"role": "system", "content": system})
    return str(writer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


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
