"""Will it fit? Bytes of weights, KV cache and activations, estimated before loading, next to the free memory."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

from studio_state.errors import StudioError
from studio_state.experiment import MemoryEstimate, ModelInfo

LIMIT_VARIABLE = "PARETO_STUDIO_MEMORY_LIMIT"
_CGROUP = Path("/sys/fs/cgroup")
_MASK_BYTES = 1


def estimate(
    info: ModelInfo,
    *,
    tokens: int,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    attention: str = "sdpa",
    chunk: int | None = None,
    logit_tokens: int = 1,
    weight_factor: float = 1.0,
    kv_factor: float = 1.0,
    free_bytes: int | None = None,
) -> MemoryEstimate:
    """Memory that one lane needs.

    Args:
        tokens: longest sequence, prompt and new tokens together.
        batch: sequences side by side.
        attention: ``eager`` holds the scores of a whole layer, ``sdpa`` does not.
        chunk: prompt tokens per prefill forward; None = all.
        logit_tokens: positions per sequence whose logits are computed in one forward.
        weight_factor, kv_factor: what the lane's policies leave of the bytes (0.28 = a 4-bit format with its scales).
        free_bytes: memory to compare with; None = ask the device.
    """
    size = dtype.itemsize
    weights = info.stored_bytes if info.packed else info.parameters * size
    return MemoryEstimate(
        weight_bytes=round(weights * weight_factor),
        kv_bytes=round(kv_bytes(info, tokens, batch, size) * kv_factor),
        activation_bytes=activation_bytes(info, tokens, batch, size, attention, chunk, logit_tokens),
        free_bytes=free_memory(device) if free_bytes is None else free_bytes,
        device=device,
    )


def kv_bytes(info: ModelInfo, tokens: int, batch: int, size: int) -> int:
    """Keys and values of all layers; a sliding-window layer keeps at most its window.

    Args:
        size: bytes of one number.
    """
    if info.family in ("vit", "diffusion"):  # nothing is kept between passes
        return 0
    per_token = 2 * info.kv_heads * info.head_dim * size
    full = (info.attention_layers - info.window_layers) * tokens
    windowed = info.window_layers * min(tokens, info.window or tokens)
    return batch * per_token * (full + windowed)


def activation_bytes(
    info: ModelInfo, tokens: int, batch: int, size: int, attention: str = "sdpa", chunk: int | None = None, logit_tokens: int = 1
) -> int:
    """Peak of what one prefill forward holds at once: the residual stream plus its largest phase.

    * attention: queries, rotated queries and output [B, T, Hq*D], keys and values [B, T, Hkv*D] three times (fresh,
      rotated, repeated to the query heads), the mask [T, S], with ``eager`` the scores and their softmax [B, Hq, T, S]
    * MLP: gate, its activation, up and their product [B, T, F]
    * logits: [B, logit tokens, V] in the weights' format and in float32

    Held against the allocator's own record in a test: within 0.85 to 1.6 of it.
    """
    new = min(chunk or tokens, tokens)
    rows = batch * new
    queries, keys = info.heads * info.head_dim, info.kv_heads * info.head_dim
    attend = rows * (3 * queries + 2 * 3 * keys) * size + 2 * batch * tokens * queries * size + new * tokens * _MASK_BYTES
    if attention == "eager":
        attend += 2 * batch * info.heads * new * tokens * max(size, 4)
    mlp = 4 * rows * info.ffn * size
    logits = batch * min(logit_tokens, new) * info.vocab * (size + 4)
    residual = 4 * rows * info.hidden * max(size, 4)  # the stream, its norm, the norm's float32 copy, the layer's output
    return residual + max(attend, mlp, logits)


def free_memory(device: str = "cpu") -> int:
    """Bytes that can still be taken on a device, container limits and ``PARETO_STUDIO_MEMORY_LIMIT`` included.

    Raises:
        StudioError: the variable is not a number of bytes.
    """
    place = torch.device(device)
    if place.type == "cuda":
        free = int(torch.cuda.mem_get_info(place)[0])
    else:
        free = min(int(psutil.virtual_memory().available), _container_free())
    limit = os.environ.get(LIMIT_VARIABLE, "").strip()
    if limit and not limit.isdecimal():
        raise StudioError(f"{LIMIT_VARIABLE} is {limit!r}; give a whole number of bytes, for example 2000000000, or unset it")
    return min(free, int(limit)) if limit else free


def _container_free() -> int:
    """What a cgroup (v2) still allows; reclaimable file cache counts as free. No limit = a very large number."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup v2 here
        return 1 << 62
    return (1 << 62) if limit == "max" else max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
