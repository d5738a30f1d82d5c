"""Profiles of devices: those that their makers publish, and those that a calibration kept in the data directory."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from studio_state.catalog import asset
from studio_state.costs import Device
from studio_state.errors import SpecError
from studio_state.paths import cannot

FOLDER = "devices"


@cache
def published() -> dict[str, Device]:
    """Id -> profile from the data sheets, in ``assets/devices.json``."""
    listed = json.loads(asset("devices.json").read_text(encoding="utf-8"))["devices"]
    return {name: Device.model_validate({**data, "source": "published"}) for name, data in listed.items()}


def find_device(name: str) -> Device:
    """The published profile with this id.

    Raises:
        SpecError: there is none.
    """
    if name not in published():
        raise SpecError(f"there is no published device {name!r}; allowed: {', '.join(published())}")
    return published()[name]


def profile_file(root: Path, name: str, threads: int | None, library: str) -> Path:
    """Where a measured profile lies: one file for a device, its CPU threads and the library that multiplies.

    Args:
        root: data directory or cache.
        library: its version.
    """
    return root / FOLDER / f"{hashlib.sha256(f'{name}|{threads}|{library}'.encode()).hexdigest()[:24]}.json"


def read_profile(file: Path) -> Device | None:
    """A measured profile; None where there is none, or the file holds something else."""
    try:
        return Device.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def write_profile(file: Path, device: Device) -> None:
    """Keep a measured profile; what was there stays until the new one is complete.

    Raises:
        StoreError: it cannot be written.
    """
    part = file.with_name(f"{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(device.model_dump_json(indent=2) + "\n", encoding="utf-8")
        part.replace(file)
    except OSError as e:
        with suppress(OSError):
            part.unlink()
        raise cannot(f"keep the profile of the device in {file.parent}", e) from e


def kept_profiles(root: Path) -> list[Device]:
    """Everything that calibrations kept in a data directory, by name and threads."""
    found = [read_profile(f) for f in (root / FOLDER).glob("*.json")]
    return sorted((d for d in found if d is not None), key=lambda d: (d.name, d.threads or 0))
