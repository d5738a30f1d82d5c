"""The list of papers with their claims, as a Gradio component."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

TEMPLATE = """
<div class="pp">
  <div class="pp-bar" role="search" aria-label="Papers"></div>
  <div class="pp-place"></div>
  <div class="ps-hidden pp-said" role="status" aria-live="polite"></div>
</div>"""
Call = Callable[[Any], dict[str, Any]]


class PaperList(gr.HTML):
    """Args:
    list_papers: returns ``{"papers": rows}``; see :func:`app.papers_view.paper_list`.
    open_claim: given ``{claim, owner, host}``, returns the claim in words, its verdicts, and how a check stands.
    begin_claim: given ``{claim, owner, host, device}``, starts a check and returns how it stands.
    claim_state: given ``{claim, owner, host}``, returns how a check stands.
    cancel_claim: given ``{claim, owner, host}``, returns ``{"message": ...}``.
    devices: devices that a check may run on.
    """

    def __init__(
        self,
        *,
        list_papers: Call,
        open_claim: Call,
        begin_claim: Call,
        claim_state: Call,
        cancel_claim: Call,
        devices: Sequence[str],
        **kwargs: Any,
    ):
        super().__init__(
            value={},
            html_template=TEMPLATE,
            js_on_load="ParetoStudio.mountPapers(element, props, server);",
            apply_default_css=False,
            server_functions=[list_papers, open_claim, begin_claim, claim_state, cancel_claim],
            devices=list(devices),
            **kwargs,
        )

    def api_info(self) -> dict[str, Any]:
        """Shape of the value for API clients."""
        return {"type": "object"}
