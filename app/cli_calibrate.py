"""``calibrate``: what a device can do at best, measured and kept for the roofline; and the published profiles beside it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from studio_state.costs import Device

STOPPED_BY_CTRL_C = 130
LONGEST_S, MOST_THREADS = 600.0, 1024  # the worker holds to the same


def calibrate(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: as a run has them.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to measure, 1 to 600.")] = 30.0,
    show_list: Annotated[
        bool, typer.Option("--list", help="Measure nothing; list what is kept and what makers publish.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Where the profile is kept; default: as for runs.")] = None,
) -> None:
    """Measure this device's memory bandwidth and its peak of products by number format; the roofline uses it from then on.

    Nothing else should run meanwhile. Exit status: 0 it is kept, 2 refused, 130 Ctrl-C, 1 anything else.
    """
    from studio_state.devices import kept_profiles, published
    from studio_state.paths import DataDir

    data = DataDir.at(data_dir)
    if not show_list:
        measure(device, threads, seconds, data.open().root)
    listed = [("", d) for d in kept_profiles(data.root)]
    show([*listed, *(published().items() if show_list else ())], as_json)


def measure(device: str, threads: int | None, seconds: float, data: Path) -> None:
    """Calibrate in a worker process that has the device to itself.

    Raises:
        SpecError: there is no such device, or a number is out of range.
        DeviceBusy: another process has the device.
        StudioError: it failed.
    """
    from rich.console import Console

    from app.dispatch.device_lock import DeviceLock
    from app.training import follow
    from studio_state.errors import DeviceBusy, SpecError, StudioError
    from studio_state.events import Cancelled, Failed

    if not 1 <= seconds <= LONGEST_S:
        raise SpecError(f"--seconds is {seconds:g}; give 1 to {LONGEST_S:g}")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise SpecError(f"--threads is {threads}; give 1 to {MOST_THREADS}, or leave it out for all cores")
    lock = DeviceLock(device)
    if not lock.acquire(0, "calibration"):
        raise DeviceBusy(f"{lock.sentence()}; calibrate when it has finished")
    request: dict[str, Any] = {"device": device, "threads": threads, "seconds": seconds, "data": str(data)}
    errors = Console(stderr=True, highlight=False)
    try:
        last = follow(request, f"calibrating {device}", errors, "calibrate")
    finally:
        lock.release()
    if isinstance(last, Failed):
        raise SpecError(last.message) if last.phase == "check" else StudioError(last.message)
    if isinstance(last, Cancelled):
        errors.print(last.message, markup=False, soft_wrap=True)
        raise typer.Exit(STOPPED_BY_CTRL_C)


def show(profiles: Iterable[tuple[str, Device]], as_json: bool) -> None:
    """Profiles as a table: bandwidth, peaks, and where the numbers come from."""
    from app.cli_lists import print_json, print_table
    from app.components.numbers import digits

    if as_json:
        return print_json([{"id": name, **d.model_dump(mode="json")} for name, d in profiles])
    rows = [
        (name, d.name, digits(d.bandwidth / 1e9), ", ".join(f"{k} {digits(v / 1e12)}" for k, v in d.peak.items()), d.origin)
        for name, d in profiles
    ]
    print_table(("id", "device", "GB/s", "trillion operations a second", "source"), rows)
