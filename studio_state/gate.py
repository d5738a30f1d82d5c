"""Many readers, or one who replaces the database under them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Many readers at a time, or one who replaces the database."""

    def __init__(self) -> None:
        self._changed, self._readers, self._closed = threading.Condition(), 0, False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold the database open."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody reads, and keep new readers waiting."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self._readers == 0)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()
