"""``methods``, ``workloads`` and ``models``: what there is, as tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.components.numbers import byte_quantity
from studio_state import zoo
from studio_state.catalog import STAGES, Catalog
from studio_state.problems import describe_range


def print_json(data: Any) -> None:
    """Print JSON for other programs."""
    print(json.dumps(data, indent=1, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of plain text; nothing in them is read as markup."""
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    console.print(table)


def show_methods(as_json: bool) -> None:
    """All methods in the order in which they act."""
    cards = sorted(Catalog.load().methods, key=lambda c: (STAGES.index(c.stage) if c.stage else len(STAGES), c.id))
    if as_json:
        return print_json([c.model_dump(mode="json") for c in cards])
    rows = [(c.id, c.stage or c.kind, ", ".join(c.families), options_text(c.knobs), c.summary) for c in cards]
    print_table(("method", "stage", "families", "knobs", "what it does"), rows)


def show_workloads(as_json: bool) -> None:
    """All workloads."""
    cards = Catalog.load().workloads
    if as_json:
        return print_json([c.model_dump(mode="json") for c in cards])
    rows = [(c.id, options_text(c.options), ", ".join(c.metrics), f"{c.summary} {c.detects}".strip()) for c in cards]
    print_table(("workload", "options", "metrics", "what it shows"), rows)


def show_models(as_json: bool) -> None:
    """All models of the zoo."""
    entries = zoo.entries()
    if as_json:
        return print_json([{**e.model_dump(mode="json"), "cached": zoo.is_cached(e)} for e in entries])
    rows = [
        (
            e.id,
            e.family,
            e.licence,
            str(byte_quantity(e.stored_bytes)),
            "yes" if zoo.is_cached(e) else "no",
            e.source.place(),
            f"{e.use} {e.note}".strip(),
        )
        for e in entries
    ]
    print_table(("model", "family", "licence", "size", "here", "source", "what for"), rows)


def options_text(schema: Mapping[str, Any]) -> str:
    """Names, defaults and ranges of the properties of a JSON Schema, one a line."""
    properties: Mapping[str, Any] = schema.get("properties", {})
    return "\n".join(f"{name}={json.dumps(p.get('default'))} ({describe_range(p)})" for name, p in properties.items())
