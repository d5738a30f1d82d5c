"""GGUF files: what their header says, and their weights as an ordinary transformers model."""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from studio_state.errors import ModelError
from workers.models.talk import first_line

_SPLIT_MARK = "-of-"
_FULL_PRECISION = ("F64", "F32", "F16", "BF16")
_UNREADABLE = (OSError, ValueError, IndexError, KeyError, OverflowError, struct.error, MemoryError)


@dataclass(frozen=True)
class GgufFacts:
    """What a GGUF file says of itself.

    Attributes:
        parameters: weights of all tensors; ``stored_bytes`` what they take in the file.
        kind: number format of most of the weights, for example ``Q4_1``.
        bits: its bits per weight without scales; 0 if the file is not quantized.
    """

    parameters: int
    stored_bytes: int
    kind: str
    bits: int
    chat_template: bool
    licence: str = ""
    title: str = ""

    @property
    def traits(self) -> tuple[str, ...]:
        """``4-bit-source`` and the like; nothing for unquantized files."""
        return (f"{self.bits}-bit-source",) if self.bits else ()

    @property
    def note(self) -> str:
        """The sentence to be shown wherever the model appears."""
        return f"The weights come from a {self.bits}-bit ({self.kind}) file, de-quantised." if self.bits else ""


def read_facts(file: Path) -> GgufFacts:
    """Read the header of a GGUF file and check that every tensor lies within the file.

    Raises:
        ModelError: not a GGUF file, truncated, damaged, or one part of several.
    """
    import gguf

    if _SPLIT_MARK in file.stem:
        raise ModelError(f"{file.name} is one part of a split GGUF file; join the parts first (llama-gguf-split --merge)")
    with file.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise ModelError(f"{file} is not a GGUF file: it does not start with the letters GGUF")
    try:
        reader = gguf.GGUFReader(file)
    except _UNREADABLE as e:
        raise ModelError(f"{file} is a truncated or damaged GGUF file ({first_line(e)}); download it again") from e
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    kind = sizes.most_common(1)[0][0] if sizes else "F32"
    return GgufFacts(
        parameters=sum(sizes.values()),
        stored_bytes=sum(int(t.n_bytes) for t in reader.tensors),
        kind=kind,
        bits=0 if kind in _FULL_PRECISION else int("".join(c for c in kind.partition("_")[0] if c.isdigit()) or 0),
        chat_template="tokenizer.chat_template" in reader.fields,
        licence=_text(reader, "general.license"),
        title=_text(reader, "general.name"),
    )


def load_model(file: Path, dtype: torch.dtype, **options: Any) -> Any:
    """The model with its weights de-quantised (not kept in packed blocks).

    Args:
        options: passed on to ``from_pretrained``.
    """
    return AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
        local_files_only=True,
        **options,
    )


def load_tokenizer(file: Path) -> Any:
    """The tokenizer that the file carries, with its chat template."""
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)


def _text(reader: Any, field: str) -> str:
    found = reader.get_field(field)
    return str(found.contents()) if found else ""
