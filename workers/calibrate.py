"""Calibrating a device in this process: what is asked for.

The request is one JSON object: ``{"device": "cpu", "data": FOLDER, "seconds": 30, "threads": null}``. It stops between two
measurements.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from workers.environment import pick_device, use_threads
from workers.job import Job, Progress
from workers.meters.device_profile import calibrate


class Request(BaseModel):
    """Which device, on how many CPU threads (None = all cores), for about how long, and whose data directory keeps it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    device: str = "cpu"
    data: Path
    seconds: float = Field(30.0, ge=1, le=600)
    threads: int | None = Field(None, ge=1, le=1024)


def _calibrate(request: Request, progress: Progress) -> None:
    def tell(what: str, done: float) -> None:
        progress.check_stopped()
        progress.say(what, done)

    device = pick_device(request.device)
    use_threads(request.threads)  # as an experiment has them
    calibrate(device, request.seconds, request.data, tell)


JOB = Job(Request, "calibrate", "the calibration", "run", _calibrate, lambda request: "nothing was kept")
