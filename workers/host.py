"""Keeps the loaded model warm between experiments of one worker."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from studio_state.errors import StudioError, Unavailable
from studio_state.experiment import ExperimentSpec, ModelInfo
from workers.families.base import Family
from workers.families.diffusion import DiffusionFamily
from workers.families.llm import LanguageFamily
from workers.families.vit import VisionFamily
from workers.families.vlm import VisionLanguageFamily
from workers.mechanisms.attention import NAME as ATTENTION
from workers.mechanisms.weight_places import Places
from workers.methods import Policy, discover
from workers.models.info import model_info
from workers.models.lazy_load import load_compressed
from workers.models.load import load_inputs, load_model, torch_dtype
from workers.models.resolve import Resolved, resolve
from workers.plan import companions
from workers.session import Session

FAMILIES: dict[str, type[Any]] = {
    "llm": LanguageFamily,
    "vlm": VisionLanguageFamily,
    "vit": VisionFamily,
    "diffusion": DiffusionFamily,
}
Progress = Callable[[str, float | None], None]


class ModelHost:
    """One loaded model at a time; asking for another one lets the first go."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] | None = None
        self.loaded: tuple[Any, Any, Any] | None = None
        self.resolved: Resolved | None = None

    def unavailable(self) -> dict[str, str]:
        """Policy id -> why it cannot run in this process."""
        out = {}
        for name, cls in discover().items():
            reason = next((r for r in map(missing, cls.card.requires) if r), None)
            if reason:
                out[name] = reason
        return out

    def inspect(self, spec: ExperimentSpec, progress: Progress = lambda text, done: None) -> ModelInfo:
        """Find the model and read its config; weights stay where they are.

        Raises:
            ModelError: it cannot be found or read.
        """
        self.resolved = resolve(
            spec.model, progress=lambda phase, done, text: progress(text or phase, done), trust_remote_code=spec.trust_remote_code
        )
        return model_info(self.resolved)

    def companions(
        self, lanes: Sequence[Sequence[Policy]], fetch: bool = True, progress: Progress = lambda text, done: None
    ) -> dict[str, ModelInfo]:
        """What is known of the models that run beside this one in some lane, by name; weights stay where they are.

        One that cannot be found or read is left out: its lane says why when it is built.

        Args:
            fetch: False = only what is on this machine already.
        """
        found = {}
        for name in dict.fromkeys(n for policies in lanes for n in companions(policies)):
            try:
                found[name] = model_info(
                    resolve(name, fetch=fetch, progress=lambda phase, done, text: progress(text or phase, done))
                )
            except StudioError:
                continue
        return found

    def open(self, spec: ExperimentSpec, info: ModelInfo, device: torch.device) -> tuple[Session, float]:
        """A session on the model, and the seconds that loading took (0 = it was warm).

        Raises:
            Unavailable: a family that cannot be run yet.
            ModelError: the weights cannot be loaded.
        """
        resolved, dtype = self.found(), torch_dtype(spec.dtype, info.dtype, str(device))
        key = (str(resolved.path), resolved.gguf_file, resolved.revision, dtype, str(device))
        start, seconds = time.perf_counter(), 0.0
        if key != self.key or self.loaded is None:
            self.unload()
            _family(info)
            self.loaded = load_model(resolved, dtype, str(device), ATTENTION)
            self.key, seconds = key, time.perf_counter() - start
        return self._session(spec, info, device, dtype, *self.loaded), seconds

    def open_compressed(
        self, spec: ExperimentSpec, info: ModelInfo, device: torch.device, policies: Sequence[Policy], progress: Progress
    ) -> tuple[Session, float]:
        """A session on a model whose weights the lane's policies replaced while it was loading.

        Raises:
            Unavailable: a family that cannot be run yet.
            ModelError: the weights cannot be loaded tensor by tensor.
        """
        resolved, dtype = self.found(), torch_dtype(spec.dtype, info.dtype, str(device))
        if resolved.packed:  # it is as small as it gets, and no policy replaces its weights
            return self.open(spec, info, device)
        self.unload()
        start = time.perf_counter()
        altering = [p for p in policies if hasattr(p, "replacement")]
        model, places = load_compressed(
            resolved, altering, _family(info), dtype, device, ATTENTION, lambda phase, done, text: progress(text or phase, done)
        )
        session = self._session(spec, info, device, dtype, model, *load_inputs(resolved, info.family))
        session.built[Places] = places
        return session, time.perf_counter() - start

    def found(self) -> Resolved:
        """The model that was inspected last."""
        if self.resolved is None:
            raise RuntimeError("inspect() comes before open()")
        return self.resolved

    def _session(
        self,
        spec: ExperimentSpec,
        info: ModelInfo,
        device: torch.device,
        dtype: torch.dtype,
        model: Any,
        processor: Any,
        images: Any = None,
    ) -> Session:
        return Session(
            spec=spec,
            info=info,
            family=_family(info),
            model=model,
            processor=processor,
            images=images,
            device=device,
            dtype=dtype,
        )

    def unload(self) -> bool:
        """Let the model go and give its memory back; False if there was none."""
        was_there = self.loaded is not None
        self.key = self.loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return was_there


def _family(info: ModelInfo) -> Family:
    if info.family not in FAMILIES:
        raise Unavailable(f"models of family {info.family} cannot be run yet; allowed: {', '.join(FAMILIES)}")
    family: Family = FAMILIES[info.family]()
    return family


def missing(requirement: str) -> str:
    """Why a requirement of a card is not met here; empty if it is."""
    if requirement == "cuda":
        return "" if torch.cuda.is_available() else "it needs a CUDA GPU, and this worker has none"
    if requirement.startswith("cpu:"):
        engine = requirement.removeprefix("cpu:")
        return "" if engine in torch.backends.quantized.supported_engines else f"this CPU build of torch has no {engine} engine"
    return "" if find_spec(requirement) else f"the package {requirement} is not installed"
