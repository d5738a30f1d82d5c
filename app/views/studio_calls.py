"""What the page's own components ask the server directly, outside Gradio's events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from app.context import Context
from app.hosted import READ_ONLY
from app.live import Visitor
from app.run_service import cancel_for, check, sentence, sentences
from studio_state.errors import StudioError

Data = dict[str, Any]
Call = Callable[[Any], Data]


def editor_calls(ctx: Context) -> dict[str, Call]:
    """Functions of :class:`app.components.pipeline_editor.PipelineEditor`, by name."""

    def check_lanes(question: Data) -> Data:
        return check(ctx, question.get("lanes") or [], question.get("setup") or {})

    def shelf() -> list[Data]:
        return [p.model_dump(mode="json") for p in ctx.saved.all()]

    def save_pipeline(pipeline: Data) -> Data:
        if ctx.hosted:
            return {"message": sentence(READ_ONLY)}
        try:
            kept = ctx.saved.save(pipeline)
        except StudioError as e:
            return {"message": sentences(e)[0]}
        return {"message": f"Saved as {kept.name}.", "saved": shelf()}

    def saved_pipelines(_: Any) -> Data:
        return {"saved": shelf()}

    def forget_pipeline(name: str) -> Data:
        if ctx.hosted:
            return {"message": sentence(READ_ONLY), "saved": shelf()}
        try:
            ctx.saved.forget(str(name))
        except StudioError as e:
            return {"message": sentences(e)[0], "saved": shelf()}
        return {"message": f"{name} is no longer saved.", "saved": shelf()}

    check_lanes.__name__ = "check"  # the name under which the browser calls it
    return {
        "check": check_lanes,
        "save_pipeline": save_pipeline,
        "saved_pipelines": saved_pipelines,
        "forget_pipeline": forget_pipeline,
    }


def live_calls(ctx: Context) -> dict[str, Call]:
    """Functions of :class:`app.components.live_race.LiveRace`, by name."""

    def visitor(request: Data) -> Visitor:
        return Visitor(str(request.get("owner") or "")[:200], ctx.is_host(str(request.get("host") or "")))

    def open_live(request: Data) -> Data:
        return {"token": ctx.tokens.issue(visitor(request))}

    def cancel_run(request: Data) -> Data:
        try:
            return {"message": cancel_for(ctx, str(request.get("experiment")), visitor(request))}
        except StudioError as e:
            return {"message": sentences(e)[0]}

    return {"open_live": open_live, "cancel_run": cancel_run}
