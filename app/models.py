"""What is known of models without loading them: the zoo's own words, and what the worker found out."""

from __future__ import annotations

import threading

from app.components.numbers import byte_quantity, digits
from app.dispatch.base import Dispatch
from studio_state import zoo
from studio_state.errors import DeviceBusy
from studio_state.estimate_errors import EstimateErrors
from studio_state.events import ModelLoaded
from studio_state.experiment import ExperimentSpec, MemoryEstimate, ModelInfo

LOOK_UP_S = 45.0
PENDING = "…"


class ModelBook:
    """Model name -> what the worker said of it. Safe to use from any thread."""

    def __init__(self, dispatch: Dispatch):
        self._dispatch = dispatch
        self._found: dict[str, ModelLoaded] = {}
        self._lock = threading.Lock()

    def known(self, model: str) -> ModelInfo | None:
        """What is known now: the worker's words, else the zoo's; None for a model never looked at."""
        with self._lock:
            found = self._found.get(model.strip())
        return found.info if found else zoo_info(model)

    def look_up(self, model: str, spec: ExperimentSpec | None, device: str) -> ModelLoaded:
        """Ask the worker, or, while it runs an experiment, remember what it said before. Blocks while it answers.

        Raises:
            DeviceBusy: it runs an experiment, and was never asked about this model.
            StudioError: the model cannot be found or read.
        """
        name = model.strip()
        if any(s.running for s in self._dispatch.status() if s.device == device):
            with self._lock:
                found = self._found.get(name)
            if found is None:
                raise DeviceBusy("the worker is busy with an experiment; more about this model is known when it is free")
            return found
        answer = self._dispatch.inspect(name, spec, device, LOOK_UP_S)
        with self._lock:
            self._found[name] = answer
        return answer


def zoo_info(model: str) -> ModelInfo | None:
    """The zoo's own words on a model: family and traits, no widths."""
    entry = zoo.find(model.strip())
    if entry is None:
        return None
    return ModelInfo(
        name=entry.id, title=entry.title, family=entry.family, traits=entry.traits, licence=entry.licence,
        source=entry.source.place(), stored_bytes=entry.stored_bytes, note=entry.note,
    )  # fmt: skip


def choices() -> list[tuple[str, str]]:
    """(label, id) of the zoo's models."""
    return [(f"{e.title} · {e.family}", e.id) for e in zoo.entries()]


def pending_rows(info: ModelInfo, errors: EstimateErrors | None = None) -> list[tuple[str, str]]:
    """Facts of a model while the worker is asked for the rest; places are kept, so that nothing jumps."""
    found = dict([*model_rows(info), ("Memory, estimated", ""), *_past(errors), ("Free", "")])
    return [(label, text or PENDING) for label, text in found.items()]


def model_rows(info: ModelInfo) -> list[tuple[str, str]]:
    """Facts of a model for the page; what is not known is empty."""
    heads = f", {info.heads} heads" + (f" ({info.kv_heads} for KV)" if info.family != "diffusion" else "") if info.heads else ""
    shape = f"{info.layers} layers, width {info.hidden}{heads}" if info.layers else ""
    each = "positions of a picture" if info.family == "diffusion" else "tokens"
    return [
        ("Family", ", ".join([info.family, *info.traits])),
        ("Parameters", f"{digits(info.parameters / 1e6)} M" if info.parameters else ""),
        ("Shape", shape),
        ("Context", f"{info.context:,} {each}" if info.context else ""),
        ("Licence", info.licence),
        ("Source", info.source),
    ]


def memory_rows(estimate: MemoryEstimate | None, errors: EstimateErrors | None = None) -> list[tuple[str, str]]:
    """What the experiment is expected to need next to what is free, and how far such estimates were off before."""
    if estimate is None:
        return []
    kv = f" + {byte_quantity(estimate.kv_bytes)} KV" if estimate.kv_bytes else ""
    parts = f"{byte_quantity(estimate.weight_bytes)} weights{kv} + {byte_quantity(estimate.activation_bytes)} activations"
    largest = max(estimate.lane_bytes, default=0)
    lane = f"{byte_quantity(largest)} (lane {estimate.lane_bytes.index(largest)})" if largest > estimate.total else ""
    return [
        ("Memory, estimated", f"{byte_quantity(estimate.total)} ({parts})"),
        *([("Largest lane", lane)] if lane else []),
        *_past(errors),
        (
            "Free",
            f"{byte_quantity(estimate.free_bytes)} on {estimate.device}{'' if estimate.fits else ': the baseline does not fit'}",
        ),
    ]


def _past(errors: EstimateErrors | None) -> list[tuple[str, str]]:
    return [("So far", errors.sentence())] if errors else []
