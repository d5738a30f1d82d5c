"""What a hosted studio (one that strangers can reach) lets them ask for.

Models by name only, no code of a model's own, experiments of a bounded size and time, a short queue, and nothing that
changes or hides what somebody else did. The studio on one's own machine has none of these limits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from app.compose import models_in_knobs, path_problems
from app.dispatch.runner import Settings
from studio_state import zoo
from studio_state.catalog import Catalog
from studio_state.experiment import ExperimentSpec
from studio_state.problems import Problem

# Most that a setting or an option of this name may be; every option that can grow beyond 256 is here (a test says so).
NUMBERS: Mapping[str, int] = {
    "repeats": 10, "batch": 8, "threads": os.cpu_count() or 1,
    "items": 300, "max_new_tokens": 256, "new_tokens": 256, "score": 256, "length": 2048, "context": 2048, "prompt_tokens": 2048,
    "steps": 50, "size": 512,
}  # fmt: skip
HUB_ID = re.compile(
    r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(@[A-Za-z0-9_][A-Za-z0-9_./-]{0,95})?"
)
READ_ONLY = "this studio is shared by all its visitors, so nothing that others see can be changed; run the studio on your own machine for that"
_OWN_MACHINE = "or run the studio on your own machine, where there is no such limit"


@dataclass(frozen=True)
class HostedLimits:
    """How much one visitor may ask for.

    Attributes:
        minutes: an experiment is stopped after so long; what was measured before is kept.
        lanes: most lanes, the baseline included.
        numbers: most that a setting, or an option of a workload, of this name may be.
        spec_chars: longest experiment, as JSON: bounds all its texts.
        download_bytes: largest model that is fetched from the Hub.
        waiting, waiting_each: experiments that may wait in all, and of one visitor.
    """

    minutes: float = 10
    lanes: int = 8
    numbers: Mapping[str, int] = field(default_factory=lambda: dict(NUMBERS))
    spec_chars: int = 20_000
    download_bytes: int = 2_000_000_000
    waiting: int = 16
    waiting_each: int = 2

    def settings(self, settings: Settings) -> Settings:
        """How workers are kept, with the time and the queue bounded."""
        return replace(settings, most_s=60 * self.minutes, waiting=self.waiting, waiting_each=self.waiting_each)

    def environment(self) -> dict[str, str]:
        """What the workers inherit: the largest download; no token of the host's own, or strangers could load its private models."""
        return {"PARETO_STUDIO_MAX_DOWNLOAD": str(self.download_bytes), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}

    def problems(self, spec: ExperimentSpec, catalog: Catalog) -> list[Problem]:
        """Everything that keeps a stranger's experiment from running here."""
        found = self.model_problems(spec.model)
        found += path_problems("", spec.workload.options, spec.workload.id, catalog)
        for place, value in models_in_knobs(spec.lanes, catalog):
            found += [place.model_copy(update={"message": p.message}) for p in self.model_problems(value)]
        if spec.trust_remote_code:
            message = "code that a model brings along is not run here; choose a model that transformers knows, " + _OWN_MACHINE
            found.append(Problem(message=message, knob="trust_remote_code"))
        return found + list(self._size_problems(spec))

    def model_problems(self, model: str) -> list[Problem]:
        """Why this model cannot be opened here: it is neither of the zoo nor a Hub id, or a folder of the host."""
        if zoo.find(model) is not None:
            return []
        if HUB_ID.fullmatch(model) and not model.lower().endswith((".gguf", ".safetensors")):
            return path_problems(model, {}, "", Catalog(methods=[], workloads=[]))
        given = model if len(model) <= 100 else f"{model[:100]}..."
        return [
            Problem(
                message=f"{given!r} cannot be opened here; choose a model of the list or a Hub id org/name[@revision]",
                knob="model",
            )
        ]

    def _size_problems(self, spec: ExperimentSpec) -> Iterator[Problem]:
        if len(spec.lanes) > self.lanes:
            yield Problem(
                message=f"{len(spec.lanes)} lanes are too many here; at most {self.lanes} with the baseline: remove some, {_OWN_MACHINE}"
            )
        asked = {
            **{name: getattr(spec, name) for name in ("repeats", "batch", "threads", "max_new_tokens")},
            **spec.workload.options,
        }
        for name, value in asked.items():
            most = self.numbers.get(name)
            if most is not None and isinstance(value, int | float) and not value <= most:  # NaN is not
                yield Problem(message=f"{name} = {value} is too much here; at most {most}: lower it, {_OWN_MACHINE}", knob=name)
        chars = len(spec.model_dump_json())
        if chars > self.spec_chars:
            yield Problem(
                message=f"the experiment is {chars:,} characters long; at most {self.spec_chars:,} here: shorten its texts, {_OWN_MACHINE}"
            )
