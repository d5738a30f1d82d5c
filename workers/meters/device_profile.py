"""What this device can do at best: its memory's speed and its peak of operations, measured once and kept."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import torch
from pydantic import ValidationError

from studio_state.costs import Device
from studio_state.paths import default_cache_root
from workers.environment import device_name

STREAM_BYTES = 256 << 20  # far more than any cache holds
EDGE = 1024  # of the square matrices that are multiplied
QUICK, THOROUGH = 1.5, 30.0  # seconds that a measurement may take
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device_profile(device: torch.device, seconds: float = QUICK) -> Device:
    """The profile of a device at the present number of threads; measured if no run before has.

    Args:
        seconds: how long a measurement may take; a longer one replaces what a shorter one found.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else None
    name = device_name(device)
    key = hashlib.sha256(f"{name}|{threads}|{torch.__version__}|{seconds > QUICK}".encode()).hexdigest()[:24]
    for long in (True, False):
        other = hashlib.sha256(f"{name}|{threads}|{torch.__version__}|{long}".encode()).hexdigest()[:24]
        if long >= (seconds > QUICK):
            try:
                return Device.model_validate_json((default_cache_root() / "devices" / f"{other}.json").read_bytes())
            except (OSError, ValidationError):
                continue
    found = measure(device, name, threads, seconds)
    file = default_cache_root() / "devices" / f"{key}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError:  # measured again next time
        pass
    return found


def measure(device: torch.device, name: str, threads: int | None, seconds: float) -> Device:
    """Read a large tensor for the bandwidth, multiply square matrices for the peak."""
    each = seconds / (1 + len(FORMATS))
    stream = torch.ones(STREAM_BYTES // 4, device=device)
    bandwidth = STREAM_BYTES / _best(stream.sum, device, each)
    peak = {}
    for label, dtype in FORMATS.items():
        a, b = (torch.randn(EDGE, EDGE, device=device).to(dtype) for _ in range(2))
        peak[label] = 2 * EDGE**3 / _best(lambda a=a, b=b: a @ b, device, each)  # type: ignore[misc]
    return Device(name=name, bandwidth=bandwidth, peak=peak, source="measured", threads=threads)


def _best(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Of many runs the time that a tenth of them stay below, in seconds; the first warms up, and a clock that leaps does not count."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 6 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[len(times) // 10]
