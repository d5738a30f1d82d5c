"""What is asked for: model x workload x lanes x device x dtype x threads x batch x seed."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from studio_state.pipeline import Pipeline

SPEC_VERSION = 1
MAX_LANES = 16


class WorkloadSpec(BaseModel):
    """Which workload, with the options that were set."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    options: dict[str, Any] = Field(default_factory=dict)


class Sampling(BaseModel):
    """How a token is drawn. ``temperature`` 0 = greedy."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    temperature: float = Field(0.0, ge=0, le=5)
    top_k: int = Field(0, ge=0, description="0 = off")
    top_p: float = Field(1.0, gt=0, le=1)


class ExperimentSpec(BaseModel):
    """One experiment. Lane 0 is always the baseline (the empty pipeline).

    Attributes:
        model: zoo id, Hub id ``org/name[@revision]`` or a local folder / GGUF file.
        lanes: pipelines; an empty one is put first if it is not there.
        reference: lane whose results are the denominators of the ratios.
        dtype: number format of the unquantized weights; ``auto`` = float32 on CPU, the file's on GPU.
        threads: CPU threads; None = ``OMP_NUM_THREADS`` where that is set, else all cores.
        batch: items that run together.
        attention: attention kernel used in every lane.
        chunk_size: prompt tokens per prefill forward; None = the whole prompt at once.
        chat_template: wrap prompts in the model's own chat template where it has one.
        max_new_tokens: tokens generated per item; None = the workload's own default.
        eos: stop at the end-of-sequence token, or ignore it (fixed number of tokens).
        repeats: how often every item is timed in every lane.
        isolate: give each lane a fresh worker process.
        analyzers: ids of what looks into every lane after the race, in passes of its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: int = SPEC_VERSION
    model: str = Field(min_length=1, max_length=4096)
    workload: WorkloadSpec
    lanes: tuple[Pipeline, ...] = Field((Pipeline(),), max_length=MAX_LANES)
    reference: int = Field(0, ge=0)
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int | None = Field(None, ge=1, le=1024)
    batch: int = Field(1, ge=1, le=256)
    seed: int = Field(0, ge=0, lt=2**63)
    attention: Literal["sdpa", "eager"] = "sdpa"
    chunk_size: int | None = Field(None, ge=1)
    chat_template: bool = True
    system_prompt: str | None = Field(None, max_length=100_000)
    max_new_tokens: int | None = Field(None, ge=1, le=100_000)
    eos: Literal["stop", "ignore"] = "stop"
    sampling: Sampling = Sampling()
    repeats: int = Field(1, ge=1, le=1000)
    isolate: bool = False
    analyzers: tuple[str, ...] = Field((), max_length=8)
    trust_remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _baseline_first(cls, data: Any) -> Any:
        if isinstance(data, dict):
            lanes = [p if isinstance(p, Pipeline) else Pipeline.model_validate(p) for p in data.get("lanes") or ()]
            if not lanes or lanes[0].steps:
                lanes.insert(0, Pipeline())
            data = {**data, "lanes": tuple(lanes)}
        return data

    @model_validator(mode="after")
    def _reference_exists(self) -> ExperimentSpec:
        if self.reference >= len(self.lanes):
            raise ValueError(f"reference is lane {self.reference}, but there are {len(self.lanes)} lanes (0 = baseline)")
        return self

    @model_validator(mode="after")
    def _can_be_written(self) -> ExperimentSpec:
        try:
            self.model_dump_json()
        except ValueError as e:  # pydantic cannot write it
            raise ValueError("a text in the experiment is binary data, not valid Unicode; write plain text") from e
        return self

    def digest(self) -> str:
        """Identity of what is asked for: sha256 of the canonical JSON, 16 hex digits."""
        asked = self.model_dump(mode="json")
        if not self.analyzers:  # as before there were any, so that old records keep their identity
            asked.pop("analyzers")
        raw = json.dumps(asked, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(raw.encode()).hexdigest()[:16]


def number_format(dtype: str, stored: str, device: str) -> str:
    """The number format that a spec's ``dtype`` means: ``auto`` = float32 on the CPU, ``stored`` elsewhere."""
    return ("float32" if device.startswith("cpu") else stored) if dtype == "auto" else dtype


class ModelInfo(BaseModel):
    """What is known of a model from its config, before weights load.

    Attributes:
        name: what the user asked for; ``revision`` the resolved one.
        fingerprint: digest over samples of the weight files, where neither a revision nor a published checksum names them.
        family: ``llm``, ``vlm``, ``diffusion`` or ``vit``.
        traits: for example ``gqa``, ``moe``, ``ssm``, ``sliding-window``, ``tied-embeddings``, ``4-bit-source``.
        parameters: number of weights; ``stored_bytes`` their size in the files.
        head_dim, hidden, ffn: widths; ``context`` the longest input it was made for.
        attention_layers: layers that keep keys and values; fewer than ``layers`` in hybrid models.
        window: longest reach of the ``window_layers`` sliding-window layers among them, in tokens.
        dtype: number format of the file: what ``auto`` means on a GPU.
        packed: pipeline and base of an exported model, whose weights are packed already; empty for all others.
        note: a sentence to be shown wherever the model appears.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    name: str
    title: str = ""
    revision: str = ""
    fingerprint: str = ""
    family: str
    architecture: str = ""
    traits: tuple[str, ...] = ()
    licence: str = ""
    source: str = ""
    parameters: int = 0
    stored_bytes: int = 0
    layers: int = 0
    hidden: int = 0
    ffn: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    vocab: int = 0
    context: int = 0
    attention_layers: int = 0
    window: int = 0
    window_layers: int = 0
    dtype: str = ""
    packed: str = ""
    note: str = ""

    @property
    def inspected(self) -> bool:
        """Its config was read. Before that only what its zoo entry says is known: the family and some of the traits."""
        return bool(self.architecture)


class MemoryEstimate(BaseModel):
    """Bytes expected on the device, all *estimated*.

    Attributes:
        lane_bytes: of the baseline's estimate: what each lane needs by itself, its policies and a draft model regarded.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    free_bytes: int
    device: str = "cpu"
    lane_bytes: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes

    @property
    def fits(self) -> bool:
        """True if the total is below the free memory."""
        return self.total <= self.free_bytes
