"""Following a training, an export or a calibration in its worker process: how far it is on stderr, Ctrl-C handed on, the record at the end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from app.cli_lists import print_json, print_table
from app.dispatch.client import worker_environment
from studio_state.errors import WorkerLost
from studio_state.events import TERMINAL, Cancelled, Event, Note, Phase, decode

RECORD = "training.json"
Operation = Literal["train", "export", "calibrate"]
_WORDS: dict[Operation, tuple[str, str]] = {
    "train": ("training", "; the state kept last is there"),
    "export": ("export", "; nothing was written"),
    "calibrate": ("calibration", "; nothing was kept"),
}
LINE_SECONDS = 30.0  # between lines of progress where there is no terminal


def follow(request: dict[str, Any], title: str, errors: Console, operation: Operation = "train") -> Event:
    """Start the worker and show what it says; returns its last word.

    Its session is its own, so that Ctrl-C reaches only this process, which then closes the worker's standard input.

    Raises:
        WorkerLost: it ended without one.
    """
    command = [sys.executable, "-P", "-m", "workers", operation, json.dumps(request)]
    what, keeps = _WORDS[operation]
    pipe, last = subprocess.PIPE, None
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        _Shown(title, errors) as shown,
        subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=worker_environment(), start_new_session=True
        ) as process,
    ):
        if process.stdin is None or process.stdout is None:
            raise WorkerLost(f"the process of the {what} was started without pipes")

        def stop(pressed: int) -> None:
            if pressed > 1:
                return process.kill()
            shown.say(
                f"stopping after this step ... (once more: at once{', back to the state kept last' * (operation == 'train')})"
            )
            process.stdin.close()  # type: ignore[union-attr]  # checked above

        with interrupts(stop) as pressed:
            for line in process.stdout:
                try:
                    event = decode(line)
                except ValueError:
                    continue
                shown.take(event)
                if getattr(event, "event", "") in TERMINAL:
                    last = event
        status = process.wait()
        log.seek(0)
        said = log.read().strip().splitlines()
    if last is not None:
        return last
    if pressed:
        return Cancelled(message=f"stopped at once{keeps}")
    raise WorkerLost(f"the {what} ended with status {status}: {(said or ['it gave no reason'])[-1][:300]}")


@contextmanager
def interrupts(stop: Callable[[int], None]) -> Iterator[list[int]]:
    """Call ``stop`` with the count of Ctrl-C and SIGTERM so far at each of them; yields the list of those that came."""
    came: list[int] = []

    def take(number: int, frame: object) -> None:
        came.append(number)
        stop(len(came))

    before = {n: signal.signal(n, take) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Shown:
    """Progress on stderr: a bar in a terminal, a line now and then elsewhere."""

    def __init__(self, title: str, errors: Console):
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)
        self.task: TaskID = self.bar.add_task(title, total=None)
        self.errors, self.next_line = errors, 0.0

    def __enter__(self) -> _Shown:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, text: str, style: str = "dim") -> None:
        """A line that stays."""
        self.bar.console.print(text, style=style, markup=False, soft_wrap=True)

    def take(self, event: Event) -> None:
        """Show a phase or a note."""
        if isinstance(event, Note):
            self.say(event.text, "yellow" if event.level == "warning" else "dim")
        if not isinstance(event, Phase):
            return
        total = None if event.done is None else 1.0
        self.bar.update(self.task, description=event.text[:70], total=total, completed=event.done or 0.0)
        if not self.errors.is_terminal and (time.monotonic() >= self.next_line or event.done == 1.0):
            self.next_line = time.monotonic() + LINE_SECONDS
            self.say(event.text)


def show(out: Path, as_json: bool) -> None:
    """The record of a training as JSON, or its scores as a table and where the checkpoint is.

    Raises:
        WorkerLost: the worker said that it finished, but left no record.
    """
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise WorkerLost(f"the training ended without a record in {out}: {e}") from e
    if as_json:
        return print_json(record)
    print_table(("metric", "value"), [(name, f"{value:.4f}") for name, value in record["scores"].items()])
    print(f"{record['title']}: {record['parameters']:,} parameters, scored on {record['examples']:,} examples that it never saw")
    print(f"it is in {out}; use it with --model {out}")
