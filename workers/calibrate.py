"""Calibrating a device in this process: what is asked for, and what is told meanwhile.

The request is one JSON object: ``{"device": "cpu", "data": FOLDER, "seconds": 30, "threads": null}``. Events go out as JSON lines:
phases, then ``finished`` or ``failed``. Closing standard input (or SIGINT, SIGTERM) stops between two measurements.
"""

from __future__ import annotations

import threading
import time
import traceback
from pathlib import Path
from typing import IO

import psutil
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from studio_state.errors import StudioError
from studio_state.events import Cancelled as CancelledEvent
from studio_state.events import Failed, Finished, Phase
from workers.environment import pick_device
from workers.meters.device_profile import calibrate
from workers.models.packed_recipe import reason
from workers.serve import Writer
from workers.session import Cancelled
from workers.train import CHECK, stop_at_the_end_of


class Request(BaseModel):
    """Which device, on how many CPU threads (None = all cores), for about how long, and whose data directory keeps it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    device: str = "cpu"
    data: Path
    seconds: float = Field(30.0, ge=1, le=600)
    threads: int | None = Field(None, ge=1, le=1024)


def calibrate_once(text: str, out: IO[str], stdin: int | None = None) -> int:
    """Calibrate what a request asks for; exit status 0 = the profile is kept, 2 = refused."""
    writer, stop, began = Writer(out), threading.Event(), time.monotonic()
    stop_at_the_end_of(stdin, stop)

    def tell(what: str, done: float) -> None:
        if stop.is_set():
            raise Cancelled
        writer.write(Phase(name="run", done=done, text=what))

    try:
        request = Request.model_validate_json(text)
        device = pick_device(request.device)
        torch.set_num_threads(request.threads or psutil.cpu_count(logical=False) or 1)  # as an experiment has them
        calibrate(device, request.seconds, request.data, tell)
    except ValidationError as e:
        writer.write(Failed(message=f"this is no request to calibrate: {reason(e)}", phase=CHECK))
        return 2
    except Cancelled:
        writer.write(CancelledEvent(message="stopped; nothing was kept"))
        return 1
    except StudioError as e:
        writer.write(Failed(message=str(e), phase="run"))
        return 1
    except Exception as e:
        writer.write(
            Failed(message=f"the calibration ended with {type(e).__name__}: {e}", phase="run", detail=traceback.format_exc())
        )
        return 1
    writer.write(Finished(seconds=time.monotonic() - began))
    return 0
