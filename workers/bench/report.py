"""Printing: a heading once, lines for people, one JSON line at the end of each bench."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from typing import Any

import psutil
import torch

from studio_state.stats import Interval
from workers.bench.plan import Plan


def heading(plan: Plan, what: str) -> str:
    """Versions, processor, threads and the load of the machine: without them a time means nothing.

    Args:
        what: the model, and what one run does.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (
        f"torch {torch.__version__}, transformers {version('transformers')}, Python {platform.python_version()}; {_processor()}, "
        f"{psutil.cpu_count(logical=False)} cores, {plan.threads} threads, load {load:.1f}; {what}, {plan.pairs} pairs"
    )


def _processor() -> str:
    """Name of the processor, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def ratio_line(label: str, ratio: Interval) -> str:
    """``label: 1.234 [1.200, 1.270], n = 9``."""
    between = f" [{ratio.low:.3f}, {ratio.high:.3f}]" if ratio.low is not None and ratio.high is not None else ""
    return f"{label}: {ratio.value:.3f}{between}, n = {ratio.n}"


def json_line(bench: str, plan: Plan, **values: Any) -> str:
    """The machine-readable result of one bench."""
    return json.dumps({"bench": bench, "model": plan.model, "threads": plan.threads, "pairs": plan.pairs, **values})
