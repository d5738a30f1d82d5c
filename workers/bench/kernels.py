"""Kernels that lean-decode and the attention function choose between: one decode step's products, one token's attention.

Weights are random, of the model's own shapes and as many as it has, so that no cache holds them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from studio_state.experiment import ExperimentSpec, ModelInfo, WorkloadSpec
from studio_state.stats import ratio_interval
from workers.bench.plan import Plan
from workers.bench.report import json_line, ratio_line
from workers.environment import use_threads
from workers.host import ModelHost
from workers.mechanisms import onednn

ATTENTION_CALLS = 300  # of one timing; a single call is too short for the clock


@torch.inference_mode()
def bench(plan: Plan) -> None:
    """Print, in float32 and bfloat16, bytes read a second by either product, and the ratios of both pairs of kernels."""
    host = ModelHost()
    use_threads(plan.threads)
    info = host.inspect(ExperimentSpec(model=plan.model, workload=WorkloadSpec(id="speed")))
    for dtype in (torch.float32, torch.bfloat16):
        _products(plan, info, dtype)
        _attention(plan, info, dtype)


def _products(plan: Plan, info: ModelInfo, dtype: torch.dtype) -> None:
    qkv = (info.heads + 2 * info.kv_heads) * info.head_dim
    layer = [(qkv, info.hidden), (info.hidden, info.heads * info.head_dim), (2 * info.ffn, info.hidden), (info.hidden, info.ffn)]
    weights = [torch.randn(s).to(dtype) for s in [*layer * info.layers, (info.vocab, info.hidden)]]
    inputs = {k: torch.randn(1, 1, k).to(dtype) for k in {w.shape[1] for w in weights}}
    fast = [onednn.linear(w, None) for w in weights]
    if None in fast:
        print(f"{dtype}: this build of PyTorch has no oneDNN product for it")
        return
    size = sum(w.nbytes for w in weights)

    def library() -> None:
        for w in weights:
            F.linear(inputs[w.shape[1]], w)

    def ours() -> None:
        for w, run in zip(weights, fast, strict=True):
            run(inputs[w.shape[1]])  # type: ignore[misc]

    a, b = _alternate(plan, ours, library)
    rates = {"onednn": size / median(a) / 1e9, "library": size / median(b) / 1e9}
    print(f"{dtype}: products of a step read {rates['onednn']:.1f} GB/s by oneDNN, {rates['library']:.1f} by F.linear (medians)")
    _tell(plan, f"speed of oneDNN / F.linear, {dtype}", b, a, rates=rates)


def _attention(plan: Plan, info: ModelInfo, dtype: torch.dtype) -> None:
    h, g, d, s = info.kv_heads, info.heads // info.kv_heads, info.head_dim, plan.prompt_tokens + plan.new_tokens
    query, keys, values = (torch.randn(1, n, t, d).to(dtype) for n, t in ((h * g, 1), (h, s), (h, s)))

    def grouped() -> None:
        for _ in range(ATTENTION_CALLS):
            F.scaled_dot_product_attention(query, keys, values, enable_gqa=g > 1)

    def packed() -> None:
        for _ in range(ATTENTION_CALLS):
            F.scaled_dot_product_attention(query.reshape(1, h, g, d), keys, values).view(1, h * g, 1, d)

    a, b = _alternate(plan, grouped, packed)
    _tell(plan, f"speed of grouped / packed queries over {s} entries, {dtype}", b, a)


def _alternate(plan: Plan, one: Callable[[], None], other: Callable[[], None]) -> tuple[list[float], list[float]]:
    """Seconds of both, in pairs whose order alternates, after one untimed run of each."""
    seconds: dict[Callable[[], None], list[float]] = {one: [], other: []}
    for pair in range(-1, plan.pairs):
        for work in (one, other) if pair % 2 == 0 else (other, one):
            start = time.perf_counter()
            work()
            if pair >= 0:
                seconds[work].append(time.perf_counter() - start)
    return seconds[one], seconds[other]


def _tell(plan: Plan, label: str, seconds_of_second: list[float], seconds_of_first: list[float], **more: Any) -> None:
    """Print how many times faster the first is, from its times and those of the second."""
    ratio = ratio_interval(seconds_of_second, seconds_of_first)
    print(ratio_line(label, ratio))
    print(json_line("kernels", plan, what=label, ratio=ratio.value, low=ratio.low, high=ratio.high, n=ratio.n, **more))
