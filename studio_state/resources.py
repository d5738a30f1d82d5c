"""The closed table of resources that policies act on, and the rule that decides conflicts.

A policy never names another policy. It says what it does to a resource:

``owns``    nobody else in the pipeline may own or edit it
``edits``   shared; policies act on it in stage order
``needs``   it must be intact
``spoils``  it is not intact while this policy is attached, wherever the policy stands

So the number of declarations grows with the methods, not with their pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

Mode = Literal["owns", "edits", "needs", "spoils"]

RESOURCES: dict[str, str] = {
    "placement.device": "on which device each part of the model lives",
    "weights.mask": "which weights are zero",
    "weights.format": "in which number format linear weights are stored",
    "weights.shape": "how many rows, heads or neurons the weight matrices have",
    "weights.values": "the values of the weights (low rank, rotation, merging)",
    "tokens.visual": "which image tokens enter or stay in the language model",
    "tokens.prompt": "which prompt tokens travel through the layers",
    "prefill.whole": "the whole prompt passes through the model in one piece",
    "attention.scores": "queries and keys of every attention call can be read",
    "attention.pattern": "which cached positions a query may look at",
    "kv.length": "which positions the key-value cache keeps",
    "kv.dtype": "in which form keys and values are stored (number format, channels)",
    "kv.values": "the contents of cached keys and values (merging, low rank)",
    "kv.rollback": "the newest cached positions can be taken back exactly",
    "kv.uniform": "all layers and heads hold the same positions",
    "residual.depth": "which layers run",
    "activations.sparsity": "which activations are treated as zero",
    "activations.format": "in which number format activations enter linear maps",
    "experts.routing": "which experts a token visits",
    "experts.weights": "which experts exist and where they are kept",
    "denoise.schedule": "how many denoising steps run and at which times",
    "denoise.reuse": "which denoiser blocks run and which reuse an earlier result",
    "denoise.guidance": "how the conditional and unconditional passes are combined",
    "denoise.attention": "which tokens the denoiser's self-attention sees",
    "denoise.rows": "the denoiser gets the same rows at every step",
    "decode.loop": "how the next tokens are decided",
    "decode.sampling": "how a token is drawn from the logits",
    "runtime.step": "how one decode step is executed",
    "runtime.compile": "how the model is compiled",
}

WEIGHTS = frozenset({"weights.mask", "weights.format", "weights.shape", "weights.values", "experts.weights"})
"""What weights there are and how they are stored: what an exported model is made of."""


class Use(BaseModel):
    """One thing a policy does to one resource.

    Attributes:
        resource: a key of :data:`RESOURCES`.
        mode: ``owns``, ``edits``, ``needs`` or ``spoils``.
        when: knob values at which the entry holds, for example ``{"bits": [4]}``; empty = always.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    resource: str
    mode: Mode
    when: dict[str, list[Any]] = {}

    @field_validator("resource")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in RESOURCES:
            raise ValueError(f"unknown resource {value!r}; allowed: {', '.join(RESOURCES)}")
        return value

    def holds(self, knobs: Mapping[str, Any]) -> bool:
        """True if this entry applies at these knob values."""
        return all(knobs.get(name) in allowed for name, allowed in self.when.items())


class Clash(BaseModel):
    """Two steps of a pipeline that cannot stand together.

    Attributes:
        first, second: positions of the two steps in the pipeline.
        resource: what they clash over.
        reason: plain words, to be completed with the titles of both policies.
    """

    model_config = ConfigDict(frozen=True)
    first: int
    second: int
    resource: str
    reason: Literal["both own", "one owns what the other edits", "one spoils what the other needs"]


def clashes(uses: Iterable[tuple[int, Iterable[Use]]]) -> list[Clash]:
    """All pairs of steps that conflict, in pipeline order.

    Args:
        uses: (position in the pipeline, the resource entries that hold for that step).
    """
    by_step = [(i, {(u.resource, u.mode) for u in entries}) for i, entries in uses]
    found: list[Clash] = []
    for a, (i, first) in enumerate(by_step):
        for j, second in by_step[a + 1 :]:
            for resource in RESOURCES:
                mine = {m for r, m in first if r == resource}
                theirs = {m for r, m in second if r == resource}
                if "owns" in mine and "owns" in theirs:
                    reason = "both own"
                elif ("owns" in mine and "edits" in theirs) or ("edits" in mine and "owns" in theirs):
                    reason = "one owns what the other edits"
                elif ("spoils" in mine and "needs" in theirs) or ("needs" in mine and "spoils" in theirs):
                    reason = "one spoils what the other needs"
                else:
                    continue
                found.append(Clash(first=i, second=j, resource=resource, reason=reason))
    return found
