"""A form drawn from a JSON Schema: options of a workload, settings of an experiment.

The knobs of a policy use the same form inside the pipeline editor. The inputs are the browser's
own, so labels, keyboard and screen readers work; the server is the judge of values.
"""

from __future__ import annotations

from typing import Any

import gradio as gr


class SchemaForm(gr.HTML):
    """``value`` is ``{"schema": JSON Schema, "values": {name: value}}``; only what differs from its default is in ``values``.

    Fires ``input`` after each edit.
    """

    def __init__(self, schema: dict[str, Any] | None = None, values: dict[str, Any] | None = None, *, name: str, **kwargs: Any):
        super().__init__(
            value=form_value(schema or {}, values),
            html_template='<div class="ps-form-place" role="group"></div>',
            js_on_load="ParetoStudio.mountForm(element, props, trigger, watch); /* 'input' */",
            apply_default_css=False,
            label=name,
            **kwargs,
        )

    def preprocess(self, payload: Any) -> dict[str, Any]:
        """What was set."""
        return dict((payload or {}).get("values") or {})

    def api_info(self) -> dict[str, Any]:
        """Shape of the value for API clients."""
        return {"type": "object"}


def form_value(schema: dict[str, Any], values: dict[str, Any] | None = None) -> dict[str, Any]:
    """A value for :class:`SchemaForm` that replaces what is shown."""
    return {"schema": schema, "values": dict(values or {})}


def part_of_schema(schema: dict[str, Any], names: tuple[str, ...], help: dict[str, str]) -> dict[str, Any]:
    """A JSON Schema of some of the properties, with help texts, in the given order."""
    properties = {n: {**schema["properties"][n], **({"description": help[n]} if n in help else {})} for n in names}
    for prop in properties.values():
        prop.pop("title", None)
    return {"type": "object", "properties": properties, "$defs": schema.get("$defs", {})}
