"""Rows of a user's JSONL, CSV, TSV or TXT file, each with the line it came from."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio_state.errors import WorkloadError
from workers.workloads.texts import read_text_file

FORMATS = (".jsonl", ".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        line: line of the file where it starts, from 1.
        cells: column -> value; a TXT line is its only column.
    """

    line: int
    cells: dict[str, Any]


def read_rows(given: str, text_column: str) -> list[Row]:
    """All rows of a file, blank ones left out.

    Args:
        given: path; its ending decides the format. TXT: one row a line.
        text_column: the column that a line of a TXT file fills.

    Raises:
        WorkloadError: unknown ending, unreadable file, a broken line, or no row.
    """
    ending = Path(given).suffix.lower()
    if ending not in FORMATS:
        raise WorkloadError(f"file {given!r} ends with {ending or 'nothing'!r}; allowed: {', '.join(FORMATS)}")
    text = read_text_file(given)
    if ending == ".txt":
        rows = [Row(n, {text_column: line.rstrip("\n")}) for n, line in _lines(text)]
    elif ending == ".jsonl":
        rows = [_json_row(given, n, line) for n, line in _lines(text)]
    else:
        rows = _csv_rows(given, text)
    if not rows:
        raise WorkloadError(f"file {given!r} has a header but no rows; add at least one")
    return rows


def _lines(text: str) -> list[tuple[int, str]]:
    """(number, line) of every line that is not blank; line ends of all systems."""
    return [(n, line) for n, line in enumerate(io.StringIO(text, newline=None), 1) if line.strip()]


def require_columns(given: str, rows: Sequence[Row], wanted: Sequence[str]) -> None:
    """Refuse a file in which a wanted column is in no row.

    Raises:
        WorkloadError: names the columns that were found.
    """
    found = list(dict.fromkeys(name for row in rows for name in row.cells))
    for name in wanted:
        if name not in found:
            raise WorkloadError(f"file {given!r} has no column {name!r}; columns found: {', '.join(found) or 'none'}")


def _json_row(given: str, number: int, line: str) -> Row:
    try:
        cells = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise WorkloadError(f"line {number} of {given!r} is not JSON ({reason}); every line must be one JSON object") from error
    if not isinstance(cells, dict):
        raise WorkloadError(f'line {number} of {given!r} is not a JSON object; write it as {{"prompt": "..."}}')
    return Row(number, cells)


def _csv_rows(given: str, text: str) -> list[Row]:
    """Comma, semicolon or tab: whichever cuts the first line into most columns."""
    first = text.lstrip("\n\r").split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # the default refuses cells over 128 kB
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    header: list[str] = []
    before = 0
    try:
        for values in reader:
            line, before = before + 1, reader.line_num
            if not any(v.strip() for v in values):
                continue
            if not header:
                header = [v.strip() for v in values]
            elif len(values) > len(header):
                raise WorkloadError(
                    f"line {line} of {given!r} has {len(values)} cells, but the header has {len(header)}; "
                    "put cells with a delimiter in double quotes"
                )
            else:
                rows.append(Row(line, dict(zip(header, values, strict=False))))
    except csv.Error as error:
        raise WorkloadError(
            f"line {reader.line_num} of {given!r} is not valid CSV ({error}); check its quotation marks"
        ) from error
    return rows
