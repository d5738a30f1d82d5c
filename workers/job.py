"""One thing done in this process on request: what is told meanwhile, how it is stopped, and how it may end.

A request is one JSON object. Events go out as JSON lines: phases and notes, then ``finished``, ``cancelled`` or ``failed``.
Closing standard input (or SIGINT, SIGTERM) stops between two steps.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from studio_state.errors import SpecError, StudioError
from studio_state.events import Cancelled as CancelledEvent
from studio_state.events import Failed, Finished, Note, Phase
from workers.models.packed_recipe import reason
from workers.serve import Writer
from workers.session import Cancelled

CHECK = "check"  # phase of a failure that is a refusal
R = TypeVar("R", bound=BaseModel)


@dataclass
class Progress:
    """What a job tells, and whether it shall go on."""

    writer: Writer
    phase: str
    stop: threading.Event = field(default_factory=threading.Event)

    def say(self, text: str, done: float | None) -> None:
        """Where it is; if nobody listens any more, it stops."""
        try:
            self.writer.write(Phase(name=self.phase, done=done, text=text))
        except OSError:
            self.stop.set()

    def note(self, text: str, warning: bool = False) -> None:
        """Something that stays to be read."""
        self.writer.write(Note(text=text, level="warning" if warning else "info"))

    def is_stopped(self) -> bool:
        """Whether it shall stop."""
        return self.stop.is_set()

    def check_stopped(self) -> None:
        """Go on only if it shall.

        Raises:
            Cancelled: it shall stop.
        """
        if self.is_stopped():
            raise Cancelled


@dataclass(frozen=True)
class Job(Generic[R]):
    """Something that can be asked for.

    Attributes:
        request: how it is asked for.
        verb, noun: for sentences: ``train``, ``the training``.
        phase: name of its progress.
        work: does it; returns the seconds that it took, or None to have them counted.
        stopped: what is said when it was stopped.
    """

    request: type[R]
    verb: str
    noun: str
    phase: str
    work: Callable[[R, Progress], float | None]
    stopped: Callable[[R], str]

    def run(self, text: str, out: IO[str], stdin: int | None = None) -> int:
        """Do it; exit status 0 = done, 1 = stopped or failed, 2 = refused.

        Args:
            text: the request, as JSON.
            out: where the events go.
            stdin: file descriptor whose end stops it.
        """
        progress, began = Progress(Writer(out), self.phase), time.monotonic()
        stop_at_the_end_of(stdin, progress.stop)
        write = progress.writer.write
        try:
            request = self.request.model_validate_json(text)
        except ValidationError as e:
            write(Failed(message=f"this is no request to {self.verb}: {reason(e)}", phase=CHECK))
            return 2
        try:
            seconds = self.work(request, progress)
        except SpecError as e:
            write(Failed(message=str(e), phase=CHECK, problems=[p.model_dump(mode="json") for p in e.problems]))
            return 2
        except Cancelled:
            write(CancelledEvent(message=f"stopped; {self.stopped(request)}"))
            return 1
        except StudioError as e:
            write(Failed(message=str(e), phase="run"))
            return 1
        except Exception as e:
            message = f"{self.noun} ended with {type(e).__name__}: {e}"
            write(Failed(message=message, phase="run", detail=traceback.format_exc()))
            return 1
        write(Finished(seconds=time.monotonic() - began if seconds is None else seconds))
        return 0


def stop_at_the_end_of(stdin: int | None, stop: threading.Event) -> None:
    """Set ``stop`` when standard input ends, or at SIGINT and SIGTERM; does nothing without a descriptor."""
    if stdin is None:
        return

    def listen() -> None:
        while os.read(stdin, 4096):
            pass
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.set())
    threading.Thread(target=listen, daemon=True).start()
