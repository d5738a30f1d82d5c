"""The public endpoints: ``run``, ``status``, ``cancel`` and ``catalog``. Typed, documented, usable from ``gradio_client``."""

from __future__ import annotations

import secrets
import time
from typing import Any

import gradio as gr

from app.compose import make_spec, read_lanes
from app.context import Context
from app.run_service import sentences, start, status
from studio_state.errors import StudioError


def build(ctx: Context) -> None:
    """Add the endpoints to the current Blocks."""
    salt = secrets.token_hex(8)

    def run(
        model: str,
        workload: str,
        lanes: list[Any],
        options: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        device: str = "cpu",
        request: gr.Request | None = None,
    ) -> dict[str, Any]:
        """Start an experiment. The baseline is always lane 0.

        Args:
            model: zoo id, Hub id, or (where the host allows it) a path.
            workload: id of a workload; the catalog lists them.
            lanes: pipelines in one line such as "rtn:bits=4+snapkv:keep=0.25", or as {"name", "steps"} objects.
            options: options of the workload.
            settings: dtype, threads, batch, seed, repeats, max_new_tokens and so on.
            device: where it runs.

        Returns:
            {"experiment": id, "cancel_token": token}
        """
        with _plain_errors():
            spec = make_spec(model, workload, read_lanes(lanes), options, settings, device)
            owner = _owner(request, salt)
            experiment = start(ctx, spec, owner, origin="api")
            return {"experiment": experiment, "cancel_token": ctx.dispatch.cancel_token(experiment, owner)}

    def get_status(experiment: str) -> dict[str, Any]:
        """How an experiment stands: status, share done, seconds left, and every lane's metrics and ratios so far.

        Args:
            experiment: the id that run returned.
        """
        with _plain_errors():
            return status(ctx, experiment, time.time())

    def cancel(experiment: str, cancel_token: str) -> str:
        """Stop an experiment, or take it out of the queue. What was measured before is kept.

        Args:
            experiment: the id that run returned.
            cancel_token: the token that run returned.
        """
        with _plain_errors():
            ctx.dispatch.cancel(experiment, cancel_token)
            return "cancelling"

    def get_catalog() -> dict[str, Any]:
        """All policies and workloads with their knobs and options as JSON Schema."""
        return ctx.catalog.model_dump(mode="json")

    gr.api(run, api_name="run", api_description=_doc(run))
    gr.api(get_status, api_name="status", api_description=_doc(get_status), queue=False)
    gr.api(cancel, api_name="cancel", api_description=_doc(cancel), queue=False)
    gr.api(get_catalog, api_name="catalog", api_description=_doc(get_catalog), queue=False)


class _plain_errors:
    """Turns our errors into the sentence that the caller sees."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, StudioError):
            raise gr.Error(" ".join(sentences(error)), print_exception=False) from error


def _owner(request: gr.Request | None, salt: str) -> str:
    """Callers of the API take turns by login, else by address."""
    client = getattr(getattr(request, "client", None), "host", "") if request else ""
    return f"api:{getattr(request, 'username', None) or client}:{salt}"


def _doc(function: Any) -> str:
    return (function.__doc__ or "").strip()
