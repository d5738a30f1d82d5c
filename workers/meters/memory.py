"""Memory: what lives at the same time, taken in a pass of its own that is never timed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import psutil
import torch

from workers.session import Session


def peak_allocated(session: Session, work: Callable[[], None]) -> int:
    """Most bytes that ``work`` had allocated at the same time, on top of what lived before.

    CUDA: the allocator's own statistics. CPU: every allocation and release of torch's CPU
    allocator, as its profiler reports them, summed in the order of time.
    """
    if session.device.type == "cuda":
        torch.cuda.synchronize(session.device)
        before = torch.cuda.memory_allocated(session.device)
        torch.cuda.reset_peak_memory_stats(session.device)
        work()
        torch.cuda.synchronize(session.device)
        return torch.cuda.max_memory_allocated(session.device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results = profile.profiler.kineto_results if profile.profiler else None
    events = results.events() if results else []
    changes = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda e: e[0])
    return max(accumulate((n for _, n in changes), initial=0))


def resident_bytes() -> int:
    """Resident memory of this process; it describes the process, never a lane."""
    return psutil.Process().memory_info().rss
