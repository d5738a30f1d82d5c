"""Writes the data of an R package as R does: serialized values, and the database that holds them."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEAD = b"X\n" + struct.pack(">iii", 3, 0x040201, 0x030500) + struct.pack(">i", 5) + b"UTF-8"


def characters(text: str | None) -> bytes:
    """A CHARSXP: marked as ASCII or UTF-8; None is NA."""
    if text is None:
        return struct.pack(">ii", 9, -1)
    data = text.encode()
    return struct.pack(">ii", 0x00040009 if text.isascii() else 0x00008009, len(data)) + data


def strings(texts: Sequence[str | None]) -> bytes:
    """A STRSXP."""
    return struct.pack(">ii", 16, len(texts)) + b"".join(map(characters, texts))


def integers(values: Sequence[int], kind: int = 13) -> bytes:
    """An INTSXP, or with kind 10 a LGLSXP."""
    return struct.pack(f">ii{len(values)}i", kind, len(values), *values)


def named(values: Mapping[str, bytes], symbol: bytes | None = None) -> bytes:
    """A VECSXP with the attribute ``names``; its symbol is written out unless a reference is given."""
    tag = symbol or struct.pack(">i", 1) + characters("names")
    attributes = struct.pack(">i", 0x402) + tag + strings(list(values)) + struct.pack(">i", 254)
    return struct.pack(">ii", 0x213, len(values)) + b"".join(values.values()) + attributes


def write_database(stem: Path, values: Mapping[str, Any], compressed: int = 1) -> None:
    """``stem.rdb`` and ``stem.rdx`` of lists of strings."""
    data, places = b"", {}
    for name, texts in values.items():
        value = HEAD + strings(texts)
        packed = struct.pack(">I", len(value)) + zlib.compress(value)
        places[name] = integers([len(data), len(packed)])
        data += packed
    first = struct.pack(">i", 0x1FF)  # a reference to the first symbol
    index = {"variables": named(places), "references": named({}, first), "compressed": integers([compressed], 10)}
    stem.with_suffix(".rdb").write_bytes(data)
    stem.with_suffix(".rdx").write_bytes(gzip.compress(HEAD + named(index, first)))
