"""The live page of one experiment, as a Gradio component fed by its own socket (``app.live``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from app.components.lanes import LANE_COLOURS, LANE_MARKS

TEMPLATE = """
<div class="lr">
  <h2 class="ps-hidden">Race</h2>
  <div class="lr-jobs"></div>
  <div class="lr-head"></div>
  <div class="lr-picker"></div>
  <div class="lr-question"></div>
  <div class="lr-lanes" role="group" aria-label="Lanes"></div>
  <div class="lr-images" role="group" aria-label="Pictures"></div>
  <div class="lr-drawn"></div>
  <div class="lr-gallery"></div>
  <div class="lr-charts" role="group" aria-label="Charts"></div>
  <div class="lr-kept"></div>
  <div class="lr-cache"></div>
  <div class="lr-experts"></div>
  <div class="lr-why" role="group" aria-label="Why not faster"></div>
  <div class="lr-table"></div>
  <div class="ps-hidden lr-status" role="status" aria-live="polite"></div>
</div>"""


class LiveRace(gr.HTML):
    """Shows one experiment while it runs and afterwards.

    ``value`` is ``{"watch": experiment, "owner": secret}``: Python sets ``watch``; the browser
    makes ``owner`` once and keeps it, so that a reload finds the run and may still cancel it.

    Fires ``stop`` when the watched experiment is over, ``tick`` when another set of experiments runs or waits.

    Args:
        open_live: returns ``{"token": ...}`` for the socket.
        cancel_run: given ``{experiment, owner}``, returns ``{"message": ...}``.
    """

    def __init__(self, *, open_live: Callable[[Any], dict[str, Any]], cancel_run: Callable[[Any], dict[str, Any]], **kwargs: Any):
        super().__init__(
            value={},
            html_template=TEMPLATE,
            js_on_load="ParetoStudio.mountRace(element, props, trigger, watch, server); /* 'stop' 'tick' */",
            apply_default_css=False,
            server_functions=[open_live, cancel_run],
            style={"colours": LANE_COLOURS, "marks": LANE_MARKS},
            **kwargs,
        )

    def preprocess(self, payload: Any) -> dict[str, Any]:
        """The watched experiment and the owner's secret."""
        return dict(payload or {})

    def api_info(self) -> dict[str, Any]:
        """Shape of the value for API clients."""
        return {"type": "object"}
