"""Smaller components of the compare page: the difference of two runs, the SQL box, and files out and in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

ServerFunction = Callable[[Any], dict[str, Any]]


class RunDiff(gr.HTML):
    """Two runs side by side. ``value`` is ``{"runs": [{id, name, mark, colour}], "a": id, "b": id}``.

    Args:
        diff_runs: given ``{runs, a, b}``, returns what :func:`app.compare_diff.diff_of` makes, or ``{error}``.
    """

    def __init__(self, *, diff_runs: ServerFunction, **kwargs: Any):
        super().__init__(
            value={"runs": []},
            html_template='<section class="rd" aria-label="Difference of two runs"><div class="rd-choose"></div><div class="ps-hidden" role="status"></div><div class="rd-body"></div></section>',
            js_on_load="ParetoStudio.mountDiff(element, props, watch, server);",
            apply_default_css=False,
            server_functions=[diff_runs],
            **kwargs,
        )

    def api_info(self) -> dict[str, Any]:
        """Shape of the value for API clients."""
        return {"type": "object"}


class SqlBox(gr.HTML):
    """A query over a copy of the record, and its result.

    Args:
        run_query: given the text, returns ``{columns, rows, note}`` or ``{error}``.
        examples: (what it shows, query).
    """

    def __init__(self, *, run_query: ServerFunction, examples: list[tuple[str, str]], **kwargs: Any):
        super().__init__(
            value={},
            html_template='<section class="sq" aria-label="SQL over the history"><div class="sq-ask"></div><div class="sq-said" role="status"></div><div class="sq-answer"></div></section>',
            js_on_load="ParetoStudio.mountSql(element, props, server);",
            apply_default_css=False,
            server_functions=[run_query],
            examples=examples,
            **kwargs,
        )

    def api_info(self) -> dict[str, Any]:
        """Shape of the value for API clients."""
        return {"type": "object"}


class RunFiles(gr.HTML):
    """Buttons that save the picked runs as files, and one that reads a run card. ``value`` is ``{"picked": [id]}``.

    Fires ``upload`` when a card was taken into the history.

    Args:
        export_file: given ``{kind, picked}``, returns ``{files: [{name, mime, base64}]}`` or ``{error}``.
        import_file: given ``{name, base64}``, returns ``{message}`` or ``{error}``.
        most_bytes: size of the largest card.
    """

    def __init__(self, *, export_file: ServerFunction, import_file: ServerFunction, most_bytes: int, **kwargs: Any):
        super().__init__(
            value={"picked": []},
            html_template='<section class="rf" aria-label="Files"><div class="rf-buttons"></div><div class="rf-said" role="status" aria-live="polite"></div></section>',
            js_on_load="ParetoStudio.mountFiles(element, props, trigger, watch, server); /* 'upload' */",
            apply_default_css=False,
            server_functions=[export_file, import_file],
            most_bytes=most_bytes,
            **kwargs,
        )

    def api_info(self) -> dict[str, Any]:
        """Shape of the value for API clients."""
        return {"type": "object"}
