"""Starts the studio inside a Space: what ``main.py`` calls.

================================== ==============================================================================
variable                           meaning
================================== ==============================================================================
GRADIO_SERVER_NAME, ..._PORT       address to listen on; 0.0.0.0 and 7860, where a Space is expected to answer
STUDIO_DATA                        folder that outlives the Space (a mounted bucket); without it all is temporary
STUDIO_AUTH                        ``USER:PASS`` that every visitor needs
STUDIO_DEVICES                     devices to offer, separated by commas; ``cpu``
================================== ==============================================================================
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from app.__main__ import explain
from app.cli import read_auth, read_devices
from app.hosted import HostedLimits
from app.server import serve
from app.space_keep import Keeper
from studio_state.errors import SpecError
from studio_state.paths import DataDir


def main(limits: HostedLimits | None = None) -> None:
    """Run the studio until the Space is stopped; ends the process with a sentence where it cannot.

    Args:
        limits: what one visitor may ask for; None = the usual ones.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a Space is stopped by it: leave as after Ctrl-C
    try:
        start(os.environ, limits or HostedLimits())
    except KeyboardInterrupt:  # before the page was there
        sys.exit(0)
    except Exception as e:
        sys.exit(explain(e))


def start(environment: Mapping[str, str], limits: HostedLimits) -> None:
    """Serve the page in hosted mode, with the record in a temporary folder and its copies where they are kept.

    Raises:
        SpecError: a variable cannot be read.
        StudioError: the page cannot be served, or the runs cannot be kept.
    """
    host, port = environment.get("GRADIO_SERVER_NAME") or "0.0.0.0", read_port(environment.get("GRADIO_SERVER_PORT") or "7860")
    auth, devices = read_auth(environment.get("STUDIO_AUTH") or None), read_devices(environment.get("STUDIO_DEVICES") or "cpu")
    with ExitStack() as stack:
        data = DataDir.at(stack.enter_context(tempfile.TemporaryDirectory(prefix="pareto-studio-"))).open()
        if kept := environment.get("STUDIO_DATA"):
            stack.enter_context(Keeper(data, Path(kept).expanduser()))
        serve(host, port, auth, data.root, devices, hosted=limits)


def read_port(text: str) -> int:
    """A port as a number.

    Raises:
        SpecError: it is none.
    """
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
        raise SpecError(f"cannot read GRADIO_SERVER_PORT = {text!r}: write a number from 1 to 65535, for example 7860")
    return int(text)
