"""How long an experiment may take, where the host bounds it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from app.dispatch.job import Job
from studio_state.events import Note


@contextmanager
def time_limit(job: Job, most_s: float | None) -> Iterator[None]:
    """Cancel the job if the block takes longer than ``most_s`` seconds, and say in its record why; None = no limit."""
    if most_s is None:
        yield
        return

    def stop() -> None:
        text = f"stopped: an experiment may take at most {most_s / 60:.3g} min here; what was measured before is kept"
        job.record(Note(level="warning", text=text))
        job.stop()

    timer = threading.Timer(most_s, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
