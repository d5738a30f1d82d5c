"""How loading talks to people: progress callbacks instead of the library's bars, one line instead of its errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers.utils import logging

Progress = Callable[[str, float | None, str], None]
"""``progress(phase, done, text)``: phase is wait, download, unpack, convert, save or ready; done is 0..1 or None."""


def silent(phase: str, done: float | None, text: str) -> None:
    """A progress callback that shows nothing."""


@contextmanager
def quiet_library() -> Iterator[None]:
    """Switch off the progress bars of transformers, and of diffusers once it is loaded, inside the block, those that were on."""
    diffusers = sys.modules.get("diffusers.utils.logging")  # not imported for the sake of silence: it takes a second
    on = [library for library in (logging, diffusers) if library is not None and library.is_progress_bar_enabled()]
    for library in on:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in on:
            library.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """A library's message, short enough for our own sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
