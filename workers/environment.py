"""Where a run took place: versions, device, threads, and what else kept the device busy."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

import psutil
import torch

from studio_state import __version__
from studio_state.errors import Unavailable
from workers.mechanisms.native import kernels

PACKAGES = ("torch", "transformers", "diffusers", "numpy", "safetensors")


def pick_device(name: str) -> torch.device:
    """The torch device of a name such as ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        Unavailable: no such device here.
    """
    allowed = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "cuda" and len(allowed) > 1:
        name = "cuda:0"
    if name not in allowed:
        raise Unavailable(f"there is no device {name!r} on this machine; allowed: {', '.join(allowed)}")
    return torch.device(name)


def use_threads(threads: int | None) -> None:
    """CPU threads of this process; None = ``OMP_NUM_THREADS`` where a person set it, else all cores that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # levels of nested regions follow
    torch.set_num_threads(threads or (int(asked) if asked.isdecimal() else 0) or usable_cores())


def usable_cores() -> int:
    """Physical cores, or as many as this process was given."""
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or given, given)


def device_name(device: torch.device) -> str:
    """The name a person would know the device by."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            found = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        found = ""
    return found or platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """All of it, as plain data."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    load = os.getloadavg() if hasattr(os, "getloadavg") else (0.0, 0.0, 0.0)
    return {
        "pareto_studio": __version__,
        "python": sys.version.split()[0],
        "versions": versions,
        "platform": platform.platform(),
        "device": str(device),
        "device_name": device_name(device),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        "logical_cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "native_kernels": kernels().told,
        "memory_bytes": psutil.virtual_memory().total,
        "load_1min": round(load[0], 2),
        "other_load": other_load(device),
    }


def other_load(device: torch.device) -> str:
    """A sentence about other load on the device; empty if there was none.

    CPU: share of all cores that was busy during a short sample, before anything ran here.
    """
    if device.type == "cuda":
        used = torch.cuda.mem_get_info(device)
        busy = (used[1] - used[0] - torch.cuda.memory_reserved(device)) / used[1]
        return f"other processes hold {busy:.0%} of the GPU's memory" if busy > 0.05 else ""
    busy = psutil.cpu_percent(interval=0.25) / 100
    return f"other processes kept {busy:.0%} of the CPU busy when the experiment began" if busy > 0.15 else ""
