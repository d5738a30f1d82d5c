"""The link that restores an experiment: model, workload, options, settings and lanes in ``?p=``."""

from __future__ import annotations

from typing import Any

from app.compose import make_spec, read_lanes
from app.context import Context
from studio_state.errors import SpecError
from studio_state.pipeline import pack_link, unpack_link

PARTS = ("model", "workload", "options", "settings", "device", "lanes")


def link_of(state: dict[str, Any]) -> str:
    """The packed state of the page."""
    return pack_link({name: state[name] for name in PARTS})


def read_link(text: str, ctx: Context) -> dict[str, Any]:
    """The state that a link holds, checked; unknown policies and knobs are kept and shown.

    Raises:
        SpecError: damaged, too long, or not an experiment.
    """
    data = unpack_link(text)
    if not isinstance(data, dict):
        raise SpecError("this link is not a link to an experiment; copy it again")
    workload, device = str(data.get("workload", "")), str(data.get("device", ctx.devices[0]))
    if workload not in ctx.catalog.workload_by_id:
        raise SpecError(f"this link names the workload {workload!r}; this studio has {', '.join(ctx.catalog.workload_by_id)}")
    options, settings = data.get("options") or {}, data.get("settings") or {}
    if not isinstance(options, dict) or not isinstance(settings, dict):
        raise SpecError("the options in this link are damaged; copy it again")
    lanes = read_lanes(data.get("lanes") or [])
    spec = make_spec(
        str(data.get("model", "")), workload, lanes, options, settings, device if device in ctx.devices else ctx.devices[0]
    )
    return {
        "model": spec.model,
        "workload": workload,
        "options": options,
        "settings": settings,
        "device": spec.device,
        "lanes": [p.model_dump(mode="json") for p in lanes],
    }
