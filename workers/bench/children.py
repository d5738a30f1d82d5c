"""Benches that share nothing: a module of this package in a process of its own, which answers with one line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from studio_state.errors import StudioError


def answer(who: str, module: str, *arguments: object) -> Any:
    """Run a module of this package and read the last line that it prints.

    Args:
        who: whose time is taken, for the message.

    Raises:
        StudioError: the process failed; its last words are the message.
    """
    command = [sys.executable, "-m", f"workers.bench.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StudioError(f"{who} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
