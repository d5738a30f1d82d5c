"""The library: a list of methods, and the page of the one that was chosen, as a Gradio component."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

TEMPLATE = """
<div class="ml">
  <nav class="ml-list" aria-label="Methods"></nav>
  <article class="ml-page" tabindex="-1" aria-label="Method"></article>
</div>"""


class Library(gr.HTML):
    """Args:
    shelf: ``{id, title, group, summary}`` of every method, in order.
    open_method: given an id, returns its page and the runs that used it.
    """

    def __init__(self, *, shelf: list[dict[str, Any]], open_method: Callable[[Any], dict[str, Any]], **kwargs: Any):
        super().__init__(
            value={},
            html_template=TEMPLATE,
            js_on_load="ParetoStudio.mountLibrary(element, props, server);",
            apply_default_css=False,
            server_functions=[open_method],
            shelf=shelf,
            **kwargs,
        )

    def api_info(self) -> dict[str, Any]:
        """Shape of the value for API clients."""
        return {"type": "object"}
