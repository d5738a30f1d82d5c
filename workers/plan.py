"""What fits into memory, decided before weights load. All numbers here are estimates."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from studio_state.experiment import ExperimentSpec, MemoryEstimate, ModelInfo
from workers.lanes import Lane
from workers.methods import Policy
from workers.models.fit import estimate as estimate_model
from workers.models.load import torch_dtype

EXPECTED_TOKENS = 1024  # where the workload's lengths are not known yet


def estimate(spec: ExperimentSpec, info: ModelInfo, device: torch.device) -> MemoryEstimate:
    """Weights, KV and activations of the baseline next to the free memory."""
    if info.family == "diffusion":  # every picture's positions at once, and twice under guidance
        tokens, rows = max(1, info.context), 2 * spec.batch
    else:
        tokens, rows = expected_tokens(spec, info), spec.batch
    return estimate_model(
        info,
        tokens=tokens,
        batch=rows,
        dtype=torch_dtype(spec.dtype, info.dtype, str(device)),
        device=str(device),
        attention=spec.attention,
        chunk=spec.chunk_size,
    )


def expected_tokens(spec: ExperimentSpec, info: ModelInfo) -> int:
    """Prompt and new tokens of the longest item, as far as the options say; at most the model's context."""
    tokens = int(spec.workload.options.get("length") or spec.workload.options.get("prompt_tokens") or EXPECTED_TOKENS)
    tokens += spec.max_new_tokens or 64
    return min(tokens, info.context) if info.context else tokens


def weight_bits(spec: ExperimentSpec, info: ModelInfo, device: torch.device) -> int:
    """Bits of one weight of the baseline."""
    return 8 * torch_dtype(spec.dtype, info.dtype, str(device)).itemsize


def lane_bytes(estimate: MemoryEstimate, policies: Sequence[Policy], bits: int) -> int:
    """Bytes a lane needs by itself.

    Args:
        bits: of one weight of the baseline.
    """
    weights = prod(p.weight_factor(bits) for p in policies)
    kv = prod(p.kv_factor() for p in policies)
    return int(estimate.weight_bytes * weights + estimate.kv_bytes * kv + estimate.activation_bytes)


def lane_fits(estimate: MemoryEstimate, policies: Sequence[Policy], bits: int) -> bool:
    """True if the lane fits by itself."""
    return lane_bytes(estimate, policies, bits) <= estimate.free_bytes


def fit_together(estimate: MemoryEstimate, lanes: Sequence[Lane], bits: int) -> bool:
    """True if the base weights and every lane's own replacements fit at the same time."""
    extra = sum(
        estimate.weight_bytes * prod(p.weight_factor(bits) for p in lane.policies)
        for lane in lanes
        if any(p.card.alters_weights for p in lane.policies)
    )
    return estimate.total + extra <= estimate.free_bytes


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


def lane_too_large(info: ModelInfo, estimate: MemoryEstimate, lane: int) -> str:
    """Why one lane cannot run."""
    what = "no baseline on this device: " if lane == 0 else ""
    return f"{what}{info.name} without enough compression needs about {gib(estimate.total)}, {gib(estimate.free_bytes)} are free on {estimate.device}"
