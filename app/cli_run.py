"""Running one experiment from the command line: progress on stderr, result on stdout."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from app.cli_table import print_result, remarks
from app.components.numbers import byte_quantity
from app.dispatch import Dispatch, LocalDispatch
from app.dispatch.runner import Settings
from app.explain import explained
from app.race import Race
from app.report import all_finished, document
from studio_state.errors import StoreError
from studio_state.estimate_errors import estimate_errors, expected
from studio_state.events import Event, Note, Preview
from studio_state.experiment import ExperimentSpec, MemoryEstimate
from studio_state.paths import DataDir

CANCELLED_BY_CTRL_C = 130
COMPARED = 100  # newest experiments whose memory estimates are held against what was measured


def run_and_show(
    spec: ExperimentSpec, data: DataDir, settings: Settings, json_file: Path | None, origin: str = "cli"
) -> tuple[dict[str, Any], int]:
    """Run an experiment in a worker of its own and show what came of it.

    Args:
        settings: how the worker is started, and whether a device that another process uses is waited for.
        json_file: where the document goes; None = nowhere.

    Returns:
        The document and the exit status: 0 = all lanes finished, 2 = refused, 130 = Ctrl-C, 1 = anything else.

    Raises:
        StudioError: it is not accepted or cannot be recorded.
    """
    if json_file:
        check_writable(json_file)
    errors = Console(stderr=True, highlight=False)
    with LocalDispatch(data, (spec.device,), settings=settings) as dispatch:
        events, interrupted = watch(dispatch, dispatch.submit(spec, owner="cli", origin=origin), errors)
    report = document(events)
    if any(lane["metrics"] for lane in report["lanes"]):
        print_result(report)
    for remark in (*remarks(report), *memory_remarks(report, data), *explained(report, events)):
        errors.print(remark, style="yellow", markup=False, soft_wrap=True)
    if json_file:
        write_json(json_file, report)
    return report, _conclude(report, interrupted, errors)


def memory_remarks(report: dict[str, Any], data: DataDir) -> list[str]:
    """What the lanes were expected to need and what they took, and how far such estimates were off over the newest runs."""
    if not report["experiment"]["estimate"]:
        return []
    estimate, told = MemoryEstimate.model_validate(report["experiment"]["estimate"]), []
    for lane in report["lanes"]:
        bytes_, peak = expected(estimate, lane["lane"]), lane["metrics"].get("peak_memory_bytes")
        if bytes_:
            told.append(
                f"lane {lane['lane']} {byte_quantity(bytes_)}" + (f" (peak measured: {byte_quantity(peak)})" if peak else "")
            )
    from studio_state.history import History  # a database is loaded only here, when the run is over

    with History.in_memory(data, limit=COMPARED) as past:
        errors = estimate_errors(past.memory_needs())
    return [f"memory, estimated before loading: {', '.join(told)}" + (f"; {errors.sentence()}" if errors else "")] if told else []


def watch(dispatch: Dispatch, experiment: str, errors: Console) -> tuple[list[Event], bool]:
    """Follow an experiment to its end with a progress bar; Ctrl-C cancels it in order.

    Args:
        errors: console on stderr.

    Returns:
        All events but looks at unfinished pictures, and whether Ctrl-C was pressed.
    """
    race, events = Race(experiment), list[Event]()
    with _bar(errors) as progress, _terminate_as_interrupt():
        task = progress.add_task("queued", total=None)

        def take(source: Iterator[Event]) -> None:
            for event in source:
                if not isinstance(event, Preview):
                    events.append(event)
                race.feed([event])
                if isinstance(event, Note):
                    progress.console.print(
                        event.text, style="yellow" if event.level == "warning" else "dim", markup=False, soft_wrap=True
                    )
                done = race.progress()
                progress.update(task, description=_phase(race), total=None if done is None else 1.0, completed=done or 0.0)

        try:
            take(dispatch.follow(experiment))
            return events, False
        except KeyboardInterrupt:
            progress.console.print("cancelling ...", style="yellow")
            dispatch.cancel(experiment, dispatch.cancel_token(experiment, "cli"))
            take(dispatch.follow(experiment, race.seq + 1))
            return events, True


def _bar(errors: Console) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)


def _phase(race: Race) -> str:
    """What happens now, in a few words."""
    if race.running_lane is not None and race.current is not None:
        item = race.items[race.current]
        return f"item {item.index + 1} of {item.of or '?'}, lane {race.running_lane}"
    if race.phase is None:
        return race.status
    lane = "" if race.phase.lane is None else f", lane {race.phase.lane}"
    return f"{race.phase.name}{lane} {race.phase.text}".strip()[:60]


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM cancel in order, as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _conclude(report: dict[str, Any], interrupted: bool, errors: Console) -> int:
    experiment = report["experiment"]
    if experiment["status"] != "finished":
        sentences = [
            p["message"] if p.get("lane") is None else f"lane {p['lane']}: {p['message']}" for p in experiment["problems"]
        ]
        for sentence in sentences or [experiment["message"] or experiment["status"]]:
            errors.print(sentence, style="red", markup=False, soft_wrap=True)
    if interrupted:
        return CANCELLED_BY_CTRL_C
    if experiment["problems"]:
        return 2
    return 0 if all_finished(report) else 1


def check_writable(path: Path) -> None:
    """Find out before a long run that its result could not be written.

    Raises:
        StoreError: the folder is missing, or the file cannot be written.
    """
    try:
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as e:
        raise StoreError(f"cannot write --json {path}: {e.strerror or e}; choose a file in a folder that exists") from e


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write the document; the old file stays until the new one is complete.

    Raises:
        StoreError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise StoreError(f"cannot write --json {path}: {e.strerror or e}; the run itself is recorded") from e
