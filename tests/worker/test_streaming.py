"""Streamed text is the decoded text, piece by piece, never half a character."""

from __future__ import annotations

import pytest

from workers.families.text import Streamer
from workers.models.zoo import fetch

TEXTS = [
    "Plain words, then a line\nand another one.\n\n" * 9,
    "Zoë’s naïve café — 北京的天气很好，明天也是。 " * 6,
    "Emoji 🧵🪡🧶 and 👩‍👩‍👧‍👦 families, flags 🇫🇮 and maths ∑∫√. " * 5,
    "    indented()\n        more()\n\treturn 1\n" * 8,
]


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(fetch("smollm2-135m"))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("step", [1, 3])
def test_pieces_join_to_the_text(tokenizer, text: str, step: int) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer(text)["input_ids"]
    stream = Streamer(tokenizer)
    pieces = [stream.put(ids[i : i + step], last=i + step >= len(ids)) for i in range(0, len(ids), step)]
    assert "".join(pieces) == text
    assert all("�" not in p for p in pieces)
