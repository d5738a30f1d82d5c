"""The worker process: ``python -m workers describe | run | serve | fetch | train | export | calibrate``.

Events go out as JSON lines on the real stdout, which is duplicated first; file descriptor 1 then
points at stderr, so no library's print can corrupt the stream.
"""

from __future__ import annotations

import json
import os
import sys
from typing import IO

import typer

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


def event_stream() -> IO[str]:
    """The real stdout, line by line; from here on everything else that prints goes to stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return stream


@app.command()
def describe() -> None:
    """Print the catalogue of methods and workloads as JSON."""
    out = event_stream()
    from workers.methods import catalogue

    out.write(json.dumps(catalogue().model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")


@app.command()
def run(spec: str = typer.Argument(help="the ExperimentSpec as JSON, or - for standard input"), experiment: str = "") -> None:
    """Run one experiment and print its events."""
    out = event_stream()
    from workers.serve import run_once

    raise typer.Exit(run_once(sys.stdin.read() if spec == "-" else spec, experiment, out))


@app.command()
def serve(device: str = "cpu") -> None:
    """Own a device and run the experiments that arrive on standard input."""
    out = event_stream()
    from workers.serve import Server

    Server(device, out).loop(sys.stdin)


@app.command()
def fetch(model: str) -> None:
    """Fetch a model of the zoo into the cache, telling progress as JSON lines."""
    out = event_stream()
    from workers.serve import fetch_model

    raise typer.Exit(fetch_model(model, out))


@app.command()
def train(request: str = typer.Argument(help="what to train, as JSON; see workers/train.py")) -> None:
    """Train a recipe, telling progress as JSON lines; stops when standard input is closed."""
    out = event_stream()
    from workers.train import JOB

    raise typer.Exit(JOB.run(request, out, stdin=0))


@app.command()
def export(request: str = typer.Argument(help="what to export, as JSON; see workers/export_model.py")) -> None:
    """Pack a model and write it as a folder, telling progress as JSON lines; stops when standard input is closed."""
    out = event_stream()
    from workers.export_model import JOB

    raise typer.Exit(JOB.run(request, out, stdin=0))


@app.command()
def calibrate(request: str = typer.Argument(help="which device, as JSON; see workers/calibrate.py")) -> None:
    """Measure what a device can do at best and keep it, telling progress as JSON lines; stops when standard input is closed."""
    out = event_stream()
    from workers.calibrate import JOB

    raise typer.Exit(JOB.run(request, out, stdin=0))


if __name__ == "__main__":
    app()
