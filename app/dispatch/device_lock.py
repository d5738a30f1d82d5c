"""One experiment at a time on a device, across all processes of a user on this machine."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from studio_state.errors import DeviceBusy
from studio_state.paths import cannot

VARIABLE = "PARETO_STUDIO_LOCKS"


def lock_folder() -> Path:
    """Folder of the device locks: of this machine and user, whatever the data directory. ``$PARETO_STUDIO_LOCKS`` moves it."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(os.environ.get(VARIABLE) or Path(tempfile.gettempdir()) / f"pareto-studio-{user}")


def same_device(device: str) -> str:
    """The name under which a device is locked: ``cuda`` and ``cuda:0`` are one."""
    return re.sub(r"[^A-Za-z0-9]+", "-", device if ":" in device or device == "cpu" else f"{device}:0")


class DeviceLock:
    """Held while an experiment runs. The operating system drops it when the process dies.

    Args:
        device: ``cpu``, ``cuda:0`` ...

    Raises:
        StoreError: the folder of the locks cannot be made.
    """

    def __init__(self, device: str):
        self.device = device
        folder = lock_folder()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise cannot(f"use the folder of device locks {folder}", e) from e
        self._holder = folder / f"{same_device(device)}.holder"
        self._lock = FileLock(folder / f"{same_device(device)}.lock", thread_local=False)

    def acquire(self, timeout_s: float, experiment: str = "") -> bool:
        """Try to take the device; False if another process still has it.

        Raises:
            StoreError: the lock file cannot be used.
        """
        try:
            self._lock.acquire(timeout=timeout_s, poll_interval=0.05)
            self._holder.write_text(json.dumps({"pid": os.getpid(), "experiment": experiment}))
        except Timeout:
            return False
        except OSError as e:
            self._lock.release()
            raise cannot(f"lock device {self.device} in {self._holder.parent}", e) from e
        return True

    def release(self) -> None:
        """Let the device go; nothing happens if it is not held."""
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release()

    def check_free(self) -> None:
        """Refuse a device that another process has at this moment.

        Raises:
            DeviceBusy: it is taken.
        """
        if self._lock.is_locked:  # by this process: its own queue decides
            return
        if not self.acquire(0):
            raise DeviceBusy(f"{self.sentence()}; wait until it has finished, or leave out --no-wait")
        self.release()

    def sentence(self) -> str:
        """Who has the device, in words."""
        try:
            holder = json.loads(self._holder.read_text())
            return f"device {self.device} is in use by process {holder['pid']} (experiment {holder['experiment']})"
        except (OSError, ValueError, KeyError):  # between its lock and its note, or already gone
            return f"device {self.device} is in use by another process"
