"""``zoo fetch``: the worker fetches, this shows how far it is."""

from __future__ import annotations

import subprocess
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from app.dispatch.client import worker_environment
from studio_state import zoo
from studio_state.errors import ModelError, WorkerLost
from studio_state.events import Failed, Note, Phase, decode


def fetch(model: str) -> None:
    """Fetch a model of the zoo in a worker process.

    Raises:
        ModelError: there is no such model, or it cannot be fetched.
        WorkerLost: the process ended without a word.
    """
    entry = zoo.get(model)
    command = [sys.executable, "-P", "-m", "workers", "fetch", entry.id]
    errors = Console(stderr=True, highlight=False)
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), console=errors, transient=True
    )
    said, failed = "", ""
    with (
        bar,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=worker_environment()) as process,
    ):
        if process.stdout is None or process.stderr is None:
            raise WorkerLost("the fetching process was started without pipes")
        task = bar.add_task(entry.title, total=None)
        for line in process.stdout:
            try:
                event = decode(line)
            except ValueError:
                continue
            if isinstance(event, Phase):
                bar.update(
                    task,
                    description=event.text[:70] or event.name,
                    total=None if event.done is None else 1.0,
                    completed=event.done or 0,
                )
            elif isinstance(event, Note):
                said = event.text
            elif isinstance(event, Failed):
                failed = event.message
        log = process.stderr.read()
    if failed:
        raise ModelError(failed)
    if process.returncode:
        last = (log.strip().splitlines() or ["it gave no reason"])[-1]
        raise WorkerLost(f"fetching {model} ended with status {process.returncode}: {last[:300]}")
    print(said or f"{model} is ready")
