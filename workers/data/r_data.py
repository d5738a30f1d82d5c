"""Data that R packages bring along, read without R: databases of serialized values.

The layout is that of *R Internals*, section 1.8 (serialization formats), and of ``makeLazyLoadDB`` in R's package tools: ``X.rdx``
is a gzipped index of offsets and lengths; each value in ``X.rdb`` is its unpacked size, big-endian, and a zlib stream.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from studio_state.errors import WorkloadError

SYMBOL, PAIRS, CHARACTERS, LOGICAL, INTEGER, REAL, STRINGS, LIST, NIL, REFERENCE = 1, 2, 9, 10, 13, 14, 16, 19, 254, 255
HAS_ATTRIBUTES, HAS_TAG, LATIN1 = 1 << 9, 1 << 10, 1 << 14
ZLIB = 1  # the only packing that R writes unless it is asked for another


def read_database(stem: Path, names: Iterable[str]) -> dict[str, Any]:
    """Values of ``stem.rdb`` by their names in ``stem.rdx``.

    Raises:
        WorkloadError: not such a database, damaged, packed in another way, or without one of the names.
    """
    try:
        index = read_value(gzip.decompress(stem.with_suffix(".rdx").read_bytes()))
        if not isinstance(index, dict) or index.get("compressed") != [ZLIB]:
            raise ValueError("its values are not packed with zlib")
        places, data = index["variables"], stem.with_suffix(".rdb").read_bytes()
        if missing := [name for name in names if name not in places]:
            raise ValueError(f"it holds no {missing[0]!r}, but {', '.join(places)}")
        return {name: read_value(_unpacked(data, *places[name])) for name in names}
    except (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, struct.error, zlib.error) as e:
        raise WorkloadError(
            f"{stem}.rdb and .rdx are no R database that can be read ({e}); take them from the package again"
        ) from e


def _unpacked(data: bytes, offset: int, length: int) -> bytes:
    """One value of the database."""
    (size,) = struct.unpack_from(">I", data, offset)
    value = zlib.decompress(data[offset + 4 : offset + length])
    if len(value) != size:
        raise ValueError(f"a value of {size:,} bytes has {len(value):,}")
    return value


def read_value(data: bytes) -> Any:
    """A serialized value: vectors as lists, lists with names as dicts, R's NULL and missing strings as None.

    Raises:
        ValueError: not the binary format (``X``) of version 2 or 3, or a kind of value that plain data does not have.
        struct.error: it ends too early.
    """
    return _Stream(data).value()


class _Stream:
    """The bytes of one value and how far they are read. Every item begins with its kind and flags in four bytes."""

    def __init__(self, data: bytes) -> None:
        version = struct.unpack_from(">i", data, 2)[0] if data[:2] == b"X\n" else 0
        if version not in (2, 3):
            raise ValueError("it is not in R's binary format of version 2 or 3")
        self.data, self.at = data, 14
        self.symbols: list[Any] = []
        if version == 3:
            self.take(f"{self.number()}s")  # the native encoding: strings carry their own

    def take(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f">{layout}", self.data, self.at)
        self.at += struct.calcsize(f">{layout}")
        return found

    def number(self) -> int:
        return int(self.take("i")[0])

    def value(self) -> Any:
        """The next item with all that belongs to it."""
        flags = self.number()
        kind = flags & 0xFF
        if kind == NIL:
            return None
        if kind == CHARACTERS:
            return self.characters(flags)
        if kind == SYMBOL:
            self.symbols.append(self.value())
            return self.symbols[-1]
        if kind == REFERENCE:
            return self.symbols[(flags >> 8 or self.number()) - 1]
        if kind == PAIRS:
            return self.pairs(flags)
        return self.vector(kind, flags)

    def characters(self, flags: int) -> str | None:
        length = self.number()
        if length < 0:
            return None
        return str(self.take(f"{length}s")[0], "latin-1" if flags & LATIN1 else "utf-8")

    def pairs(self, flags: int) -> dict[Any, Any]:
        """A pair list, as attributes are kept: tag -> value."""
        found: dict[Any, Any] = {}
        while flags & 0xFF == PAIRS:
            if flags & HAS_ATTRIBUTES:
                self.value()
            tag = self.value() if flags & HAS_TAG else None
            found[tag] = self.value()
            flags = self.number()
        return found

    def vector(self, kind: int, flags: int) -> Any:
        length = self.number()
        if kind in (LOGICAL, INTEGER):
            found = list(self.take(f"{length}i"))
        elif kind == REAL:
            found = list(self.take(f"{length}d"))
        elif kind in (STRINGS, LIST):
            found = [self.value() for _ in range(length)]
        else:
            raise ValueError(f"a value of kind {kind} is no plain data")
        attributes = self.value() if flags & HAS_ATTRIBUTES else None
        names = attributes.get("names") if isinstance(attributes, dict) else None
        return dict(zip(names, found, strict=True)) if names else found
