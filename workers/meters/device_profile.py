"""What this device can do at best: its memory's speed and its peak of products, measured once and kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from studio_state.costs import Device
from studio_state.devices import profile_file, read_profile, write_profile
from studio_state.errors import StoreError
from studio_state.paths import default_cache_root, default_data_root
from workers.environment import device_name, other_load

STREAM_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # far more than any cache holds
EDGE = {"cpu": 1024, "cuda": 8192}  # of the square matrices that are multiplied at most
QUICK = 1.5  # seconds that a measurement in passing takes
IN_PASSING = ("float32", "bfloat16")
FORMATS = (*IN_PASSING, "float16", "int8")
SMALL_EDGE = 128
LEAST = 6  # runs of each measurement, however short it should be
Tell = Callable[[str, float], None]
_of_this_process: dict[Path, Device] = {}


def device_profile(device: torch.device) -> Device:
    """The profile of a device at the present number of threads.

    The calibrated one, if the data directory has it; else the one that an earlier run measured in passing; else it is
    measured now, for a second or two. What is measured in passing while other programs run is kept by
    this process only, so that all lanes of a run are held against the same.
    """
    for root in (default_data_root(), default_cache_root()):
        found = read_profile(place(root, device))
        if found is not None:
            return found
    file = place(default_cache_root(), device)
    if file in _of_this_process:
        return _of_this_process[file]
    measured = measure(device, QUICK, IN_PASSING)
    if measured.busy:
        _of_this_process[file] = measured
        return measured
    with contextlib.suppress(StoreError):  # measured again next time
        write_profile(file, measured)
    return measured


def calibrate(device: torch.device, seconds: float, root: Path, tell: Tell) -> Path:
    """Measure a device for longer and in all formats, and keep the profile in a data directory; returns the file.

    Raises:
        StoreError: it cannot be written.
    """
    today = datetime.now(UTC).astimezone().date().isoformat()
    measured = measure(device, seconds, FORMATS, tell).model_copy(update={"calibrated": today})
    file = place(root, device)
    write_profile(file, measured)
    return file


def place(root: Path, device: torch.device) -> Path:
    """The file of a device's profile at the present number of threads."""
    return profile_file(root, device_name(device), _threads(device), torch.__version__)


def measure(
    device: torch.device, seconds: float, formats: tuple[str, ...] = IN_PASSING, tell: Tell = lambda what, done: None
) -> Device:
    """Read a large tensor for the bandwidth, multiply square matrices for the peaks.

    Args:
        seconds: how long it may take in all; one run of a measurement that takes longer is finished.
        formats: of the products; one that PyTorch cannot multiply on the device is left out.
        tell: hears what is measured and the share that is done.
    """
    busy = bool(other_load(device))
    each, peak = seconds / (1 + len(formats)), {}
    tell("memory bandwidth", 0.0)
    size = STREAM_BYTES[device.type]
    stream = torch.ones(size // 4, device=device)
    bandwidth = size / _best(stream.sum, device, each)
    del stream
    for i, name in enumerate(formats):
        tell(f"products in {name}", (1 + i) / (1 + len(formats)))
        with contextlib.suppress(RuntimeError, NotImplementedError):
            peak[name] = _peak(name, device, each)
    return Device(
        name=device_name(device), bandwidth=bandwidth, peak=peak, source="measured", threads=_threads(device), busy=busy
    )


def _peak(name: str, device: torch.device, seconds: float) -> float:
    """Operations a second. A format that the device has no units for is measured on smaller matrices, so that it takes no minutes."""
    edge = SMALL_EDGE
    while edge < EDGE[device.type] and 8 * LEAST * _best(_product(name, edge, device), device, 0.0, 2) < seconds:
        edge *= 2
    return 2 * edge**3 / _best(_product(name, edge, device), device, seconds)


def _product(name: str, edge: int, device: torch.device) -> Callable[[], object]:
    """One product of square matrices in a format; integers are summed in 32 bits."""
    if name == "int8":
        a, b = (torch.randint(-128, 128, (edge, edge), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b)
    x, y = (torch.randn(edge, edge, device=device).to(getattr(torch, name)) for _ in range(2))
    return lambda: x @ y


def _threads(device: torch.device) -> int | None:
    return torch.get_num_threads() if device.type == "cpu" else None


def _best(work: Callable[[], object], device: torch.device, seconds: float, least: int = LEAST) -> float:
    """Of many runs the time that a tenth of them stay below, in seconds; the first warms up, and a clock that leaps does not count."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < least or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[len(times) // 10]
