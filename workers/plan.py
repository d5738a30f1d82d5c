"""What fits into memory, decided before weights load. All numbers here are estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from studio_state.experiment import ExperimentSpec, MemoryEstimate, ModelInfo
from workers.mechanisms.weight_policy import WeightPolicy
from workers.methods import Policy
from workers.models.fit import estimate as estimate_model
from workers.models.load import torch_dtype

EXPECTED_TOKENS = 1024  # where the workload's lengths are not known yet


def estimate(spec: ExperimentSpec, info: ModelInfo, device: torch.device, dtype: torch.dtype | None = None) -> MemoryEstimate:
    """Weights, KV and activations of a model without any policy next to the free memory.

    Args:
        dtype: number format of its weights; None = what the experiment says.
    """
    if info.family == "diffusion":  # every picture's positions at once, and twice under guidance
        tokens, rows = max(1, info.context), 2 * spec.batch
    else:
        tokens, rows = expected_tokens(spec, info), spec.batch
    return estimate_model(
        info,
        tokens=tokens,
        batch=rows,
        dtype=dtype or torch_dtype(spec.dtype, info.dtype, str(device)),
        device=str(device),
        attention=spec.attention,
        chunk=spec.chunk_size,
    )


def expected_tokens(spec: ExperimentSpec, info: ModelInfo) -> int:
    """Prompt and new tokens of the longest item, as far as the options say; at most the model's context."""
    tokens = int(spec.workload.options.get("length") or spec.workload.options.get("prompt_tokens") or EXPECTED_TOKENS)
    tokens += spec.max_new_tokens or 64
    return min(tokens, info.context) if info.context else tokens


@dataclass(frozen=True)
class Needs:
    """What the lanes of an experiment need.

    Attributes:
        baseline: of the model itself.
        bits: of one weight of the baseline.
        beside: of each model that runs beside it in some lane, by name, in the baseline's number format.
        embedding, head: bytes of the table that no policy replaces, and of the output head (which it may be tied to).
    """

    baseline: MemoryEstimate
    bits: int
    beside: Mapping[str, MemoryEstimate] = field(default_factory=dict)
    embedding: int = 0
    head: int = 0

    def lane(self, policies: Sequence[Policy]) -> MemoryEstimate:
        """Of one lane by itself. A draft's cache counts in full, also where it is gone before the model's own grows."""
        names = companions(policies)
        drafts = [self.beside[n] for n in names if n in self.beside]
        loaded = [self.beside[n] for n in dict.fromkeys(names) if n in self.beside]  # policies share the weights
        base = self.baseline
        return base.model_copy(
            update={
                "weight_bytes": self._weights(policies) + sum(d.weight_bytes for d in loaded),
                "kv_bytes": int(base.kv_bytes * prod(p.kv_factor() for p in policies)) + sum(d.kv_bytes for d in drafts),
                "activation_bytes": max(x.activation_bytes for x in (base, *loaded)),  # they run in turn
            }
        )

    def told(self, lanes: Sequence[Sequence[Policy]]) -> MemoryEstimate:
        """The baseline's estimate, with what each of these lanes needs."""
        return self.baseline.model_copy(update={"lane_bytes": tuple(self.lane(policies).total for policies in lanes)})

    def fit_together(self, lanes: Sequence[Sequence[Policy]]) -> bool:
        """True if the base weights, every lane's replacements and every model beside it fit at the same time.

        Caches and activations are of one lane at a time: the largest.
        """
        names = dict.fromkeys(n for policies in lanes for n in companions(policies) if n in self.beside)
        weights = self.baseline.weight_bytes + sum(self.beside[n].weight_bytes for n in names)
        weights += sum(
            self._weights(policies)
            for policies in lanes
            if any(isinstance(p, WeightPolicy) or p.card.alters_weights for p in policies)
        )
        alone = map(self.lane, ([], *lanes))
        return weights + max(x.kv_bytes + x.activation_bytes for x in alone) <= self.baseline.free_bytes

    def _weights(self, policies: Sequence[Policy]) -> int:
        maps = self.baseline.weight_bytes - self.embedding - self.head
        inside, head = (
            prod(f(self.bits) for f in fs) for fs in ([p.weight_factor for p in policies], [p.head_factor for p in policies])
        )
        return int(self.embedding + self.head * head + maps * inside)


def companions(policies: Sequence[Policy]) -> list[str]:
    """Names of the models that run beside the lane's own, one a policy that has one."""
    return [name for p in policies if (name := p.companion())]


def needs_whole_model(info: ModelInfo, policies: Sequence[Policy]) -> str:
    """Why a lane cannot be packed while it loads, where every weight is seen once and alone; empty if it can."""
    start = f"{info.name} does not fit into memory before it is packed, and "
    if info.family == "diffusion":
        return f"{start}the parts of a pipeline are loaded whole; choose a smaller model or a narrower dtype"
    for policy in policies:
        if isinstance(policy, WeightPolicy) and (policy.wants is not None or type(policy).plan is not WeightPolicy.plan):
            does = (
                "decides for all maps of the model at once"
                if policy.wants is None
                else "looks at what goes into the maps of the whole model"
            )
            return f"{start}{policy.card.id} {does}, so it cannot pack one while it loads; take rtn, or a smaller model"
    return ""


def needs(spec: ExperimentSpec, info: ModelInfo, device: torch.device, beside: Mapping[str, ModelInfo]) -> Needs:
    """What lanes need, judged by what is known of the model and of those that run beside it.

    Args:
        beside: draft models by name; one that is missing does not count.
    """
    dtype = torch_dtype(spec.dtype, info.dtype, str(device))
    drafts = {name: estimate(spec, draft, device, dtype) for name, draft in beside.items()}
    table = info.vocab * info.hidden * dtype.itemsize if info.family in ("llm", "vlm") and not info.packed else 0
    return Needs(
        estimate(spec, info, device),
        8 * dtype.itemsize,
        drafts,
        embedding=0 if "tied-embeddings" in info.traits else table,
        head=table,
    )


def gib(n: float) -> str:
    """Bytes for people."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def too_large(info: ModelInfo, estimate: MemoryEstimate) -> str:
    """Why nothing can run."""
    return (
        f"{info.name} needs about {gib(estimate.total)} ({gib(estimate.weight_bytes)} weights, {gib(estimate.kv_bytes)} KV cache, "
        f"{gib(estimate.activation_bytes)} activations), but {gib(estimate.free_bytes)} are free on {estimate.device}, and no lane compresses it "
        "enough; choose a smaller model, a narrower dtype, or add a weight policy such as rtn:bits=4"
    )


def lane_too_large(info: ModelInfo, needs: Needs, lane: int, policies: Sequence[Policy]) -> str:
    """Why one lane cannot run."""
    what = "no baseline on this device: " if lane == 0 else ""
    need, beside = needs.lane(policies), companions(policies)
    how = f"with {' and '.join(dict.fromkeys(beside))} beside it" if beside else "without enough compression"
    advice = "; give a smaller draft_model, or none" if beside else ""
    return f"{what}{info.name} {how} needs about {gib(need.total)}, {gib(need.free_bytes)} are free on {need.device}{advice}"
