"""The library page: every method from its card, with the runs that used it here."""

from __future__ import annotations

from typing import Any

from app.components.library import Library
from app.context import Context
from app.library import method_page, no_runs, runs_of, shelf
from app.views.shared_link import link_of
from studio_state.catalog import Card
from studio_state.errors import StudioError

TITLE = "Library"


def build(ctx: Context) -> None:
    """Lay out the page inside the current Blocks."""

    def open_method(request: Any) -> dict[str, Any]:
        card = ctx.catalog.by_id.get(str(request))
        if card is None:
            return {"error": "There is no such method in this studio; choose one from the list."}
        found = {**method_page(card, ctx.catalog, ctx.unavailable(ctx.devices[0])), "try": try_link(ctx, card)}
        if card.kind != "policy":
            return {**found, "runs": no_runs(card)}
        try:
            return {**found, "runs": runs_of(ctx.store, card.id) if ctx.store else {"rows": [], "summary": ""}}
        except StudioError as e:
            return {**found, "runs": {"rows": [], "summary": str(e)}}

    Library(shelf=shelf(ctx.catalog), open_method=open_method, elem_id="library")


def try_link(ctx: Context, card: Card) -> str:
    """The packed state of the Studio tab with this policy alone in a lane; empty where it cannot be put there."""
    fits = [
        w.id
        for w in ctx.catalog.workloads
        if (not card.workloads or w.id in card.workloads) and set(w.families) & set(card.families)
    ]
    models = [row.model for row in ctx.store.experiments(limit=1)] if ctx.store else []
    model = next((m for m in models if m), None) or "smollm2-135m"
    if card.kind != "policy" or not fits or "llm" not in card.families:
        return ""
    lane = {"name": card.title, "steps": [{"policy": card.id, "knobs": {}}]}
    return link_of(
        {"model": model, "workload": fits[0], "options": {}, "settings": {}, "device": ctx.devices[0], "lanes": [lane]}
    )
