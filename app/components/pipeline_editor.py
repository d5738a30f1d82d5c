"""The drag-and-drop editor of an experiment's lanes, as a Gradio component.

The browser holds the pipelines (state first: the DOM is always redrawn from ``value``); Python is
asked for problems and never sends them back into ``value``, so no slow answer can undo an edit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from app.components.lanes import LANE_COLOURS, LANE_MARKS, MAX_OWN_LANES
from studio_state.catalog import STAGES, Catalog

# Fixed text only: values in a template would be executed as JavaScript.
TEMPLATE = """
<div class="pe">
  <div class="pe-shelf" role="group" aria-label="Example and saved pipelines"></div>
  <section class="pe-palette" aria-label="Policies">
    <h2>Policies</h2>
    <input class="pe-search" type="search" placeholder="Search policies" aria-label="Search policies">
    <div class="pe-palette-list" tabindex="0" role="region" aria-label="List of policies"></div>
  </section>
  <section class="pe-main" aria-label="Lanes">
    <h2>Lanes</h2>
    <div class="pe-lanes"></div>
    <div class="pe-general"></div>
  </section>
  <p class="ps-hidden" id="pe-keys">Space picks up; up and down move within the stage, left and right to another lane;
  space drops, escape cancels, delete removes.</p>
  <div class="ps-hidden pe-live" role="status" aria-live="assertive"></div>
</div>"""

ServerFunction = Callable[[Any], dict[str, Any]]


def palette(catalog: Catalog) -> dict[str, Any]:
    """What the palette and the knob forms need of the catalogue."""
    wanted = {"id", "title", "summary", "stage", "paper", "knobs", "effects", "hopes", "families"}
    cards = [c for c in catalog.policies if c.stage]
    return {"stages": list(STAGES), "cards": [c.model_dump(mode="json", include=wanted) for c in cards]}


class PipelineEditor(gr.HTML):
    """Palette and lanes.

    ``value`` is ``{"lanes": [pipeline, ...], "rev": n}`` without the baseline. A value from Python
    without ``rev`` replaces what the browser holds.

    Args:
        examples: pipelines one click away.
        check: given ``{lanes, setup}``, returns ``{lanes: [[problem]], general: [problem], fits: {policy: reason}}``.
        save_pipeline, saved_pipelines, forget_pipeline: named pipelines.
        setup: model, workload and options that the pipelines are checked against; may be updated by events.
    """

    def __init__(
        self,
        value: Any = None,
        *,
        catalog: Catalog,
        examples: list[dict[str, Any]],
        check: ServerFunction,
        save_pipeline: ServerFunction,
        saved_pipelines: ServerFunction,
        forget_pipeline: ServerFunction,
        setup: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            value=value or {"lanes": []},
            html_template=TEMPLATE,
            js_on_load="ParetoStudio.mountEditor(element, props, trigger, watch, server); /* 'edit' */",
            apply_default_css=False,
            server_functions=[check, save_pipeline, saved_pipelines, forget_pipeline],
            catalog=palette(catalog),
            examples=examples,
            style={"colours": LANE_COLOURS, "marks": LANE_MARKS, "most": MAX_OWN_LANES},
            setup=setup or {},
            **kwargs,
        )

    def preprocess(self, payload: Any) -> list[dict[str, Any]]:
        """The lanes as data, without the baseline."""
        return list((payload or {}).get("lanes") or [])

    def postprocess(self, value: Any) -> Any:
        """Lanes from Python replace what the browser holds."""
        return {"lanes": value} if isinstance(value, list) else value

    def api_info(self) -> dict[str, Any]:
        """Shape of the value for API clients."""
        return {"type": "object", "description": "{lanes: [{name, steps: [{policy, knobs}]}]}"}
