"""Helpers to declare a card beside the class it describes: ``knob`` and ``Declared``."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


def knob(
    default: Any,
    *,
    help: str,
    fits: str | None = None,
    when: dict[str, list[Any]] | None = None,
    format: str | None = None,
    group: str | None = None,
    **bounds: Any,
) -> Any:
    """A bounded parameter.

    Args:
        default: value when it is not set.
        help: what it does and which way it moves things.
        fits: what of the model bounds it: ``layers`` (an index), ``divides-widths``,
            ``divides-head``, ``context``. Checked before weights load.
        when: values of other knobs at which it matters, for example ``{"bits": [4]}``; elsewhere ``fits`` is not checked.
        format: ``path`` = it may name a file or folder of this machine, which not every visitor may open.
        group: heading under which the form folds it away with others; None = always in view.
        bounds: pydantic's ``ge``, ``le``, ``gt``, ``lt``, ``multiple_of``, ``max_length``.
    """
    given = {"fits": fits, "when": when, "format": format, "group": group}
    extra: dict[str, Any] = {name: value for name, value in given.items() if value}
    field: FieldInfo = Field(default, description=help, json_schema_extra=extra or None, **bounds)
    return field


class Declared(BaseModel):
    """A frozen record of knobs that refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def knob_schema(cls) -> dict[str, Any]:
        """JSON Schema of the knobs, without titles that only repeat names."""
        schema = cls.model_json_schema()
        for name, prop in schema.get("properties", {}).items():
            if prop.get("title", "").replace(" ", "_").lower() == name.lower():
                prop.pop("title")
        schema.pop("title", None)
        schema.pop("description", None)
        return schema

    @classmethod
    def summary_line(cls) -> str:
        """First sentence of the docstring."""
        return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ").strip()
