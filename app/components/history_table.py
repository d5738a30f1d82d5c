"""The history as a table in which runs are picked, tagged, annotated and deleted, as a Gradio component."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

TEMPLATE = """
<div class="ht">
  <form class="ht-filters" role="search" aria-label="Filter the history"></form>
  <div class="ht-said" role="status" aria-live="polite"></div>
  <div class="ht-scroll" tabindex="0" role="region" aria-label="History of runs"></div>
  <div class="ht-pager"></div>
  <section class="ht-tray" aria-label="Picked runs"></section>
</div>"""
ServerFunction = Callable[[Any], dict[str, Any]]


class HistoryTable(gr.HTML):
    """``value`` is ``{"picked": [experiment/lane, ...]}``; a change of it fires ``change``.

    The rows are not in the value: the browser asks for one page at a time.

    Args:
        history_page: given filters and a page number, returns the page.
        history_act: tags, annotates, deletes or takes back; returns ``{message, undo}`` or ``{error}``.
        most: how many runs may be picked.
        names: id, name, mark and colour of the picked runs, set by events.
        reload: set by events to another number when the history must be read anew.
    """

    def __init__(
        self,
        *,
        history_page: ServerFunction,
        history_act: ServerFunction,
        most: int,
        names: list[dict[str, Any]] | None = None,
        reload: int = 0,
        **kwargs: Any,
    ):
        super().__init__(
            value={"picked": []},
            html_template=TEMPLATE,
            js_on_load="ParetoStudio.mountHistory(element, props, trigger, watch, server);",
            apply_default_css=False,
            server_functions=[history_page, history_act],
            most=most,
            names=names or [],
            reload=reload,
            **kwargs,
        )

    def preprocess(self, payload: Any) -> list[str]:
        """Ids of the picked runs."""
        return [str(x) for x in (payload or {}).get("picked") or []]

    def api_info(self) -> dict[str, Any]:
        """Shape of the value for API clients."""
        return {"type": "object", "description": "{picked: [experiment/lane]}"}
