"""What a worker wrote to stderr: a bounded file, and the last lines for the error that a person sees."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path


class WorkerLog:
    """Two files of at most ``limit`` bytes (``x.log``, ``x.log.1``) and the last lines in memory.

    The files are a convenience: where they cannot be written, the lines in memory stay.

    Args:
        path: the file; its folder is made when first needed.
        limit: bytes after which the file is turned over.
        lines: lines kept in memory.
    """

    def __init__(self, path: Path, limit: int = 2_000_000, lines: int = 40):
        self.path, self._limit = path, limit
        self._tail: deque[str] = deque(maxlen=lines)
        self._guard = threading.Lock()

    def write(self, line: bytes) -> None:
        """Add one line (or a piece of a very long one)."""
        with self._guard:
            self._tail.append(line.decode(errors="replace").rstrip()[:2000])
            try:
                self._turn_over(len(line))
                with open(self.path, "ab") as f:
                    f.write(line)
            except OSError:  # full disk: the tail in memory is what a person will see
                return

    def _turn_over(self, more: int) -> None:
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
        elif self.path.stat().st_size + more > self._limit:
            self.path.replace(self.path.with_name(self.path.name + ".1"))

    def tail(self) -> str:
        """The last lines."""
        with self._guard:
            return "\n".join(self._tail)

    def last(self) -> str:
        """The last line that says something."""
        with self._guard:
            return next((line for line in reversed(self._tail) if line.strip()), "")
