"""The near end of one worker process: JSON lines out, events in, log aside."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import app
from app.dispatch.worker_log import WorkerLog
from studio_state.errors import WorkerLost
from studio_state.events import Event, Failed, Hello, Note, decode
from studio_state.paths import DATA_VARIABLE

MAX_LINE_BYTES = 64 * 1024 * 1024
MAX_FOREIGN_NOTES = 20
_DRAIN_S = 5.0


def worker_command(device: str) -> list[str]:
    """The worker of this installation. ``-P``: a folder named ``workers`` where one happens to stand is not taken for it."""
    return [sys.executable, "-P", "-m", "workers", "serve", "--device", device]


def worker_environment(data: Path | None = None) -> dict[str, str]:
    """This process' environment, with the folder that this package lies in on the path.

    Args:
        data: the data directory, where the worker finds what was calibrated; None = as this process has it.
    """
    root = str(Path(app.__file__).resolve().parent.parent)
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **({DATA_VARIABLE: str(data)} if data else {})}


class WorkerClient:
    """Starts a worker and talks to it. No call blocks on the worker, except :meth:`end`.

    It runs in a session of its own, so that Ctrl-C in a terminal reaches only the dispatcher, which
    then cancels in order.

    Args:
        command: what to start.
        worker_log: where its stderr goes.
        on_event: called on the reading thread with this client and every event but ``hello``.
        on_exit: called once, after the last event, with this client.
        data: the data directory.

    Attributes:
        hello: what the worker said of itself; ``greeted`` is set when it is there.
        refusal: why it cannot work on its device, if it said that instead.
        exit_code: set before ``exited``; negative = signal.

    Raises:
        WorkerLost: it cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        worker_log: WorkerLog,
        on_event: Callable[[WorkerClient, Event], None],
        on_exit: Callable[[WorkerClient], None],
        data: Path | None = None,
    ):
        self.log = worker_log
        self.hello: Hello | None = None
        self.refusal = ""
        self.exit_code = 0
        self._foreign = 0
        self.greeted, self.exited = threading.Event(), threading.Event()
        self._on_event, self._on_exit = on_event, on_exit
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                list(command), stdin=pipe, stdout=pipe, stderr=pipe, env=worker_environment(data), start_new_session=True
            )
        except OSError as e:
            raise WorkerLost(f"the worker cannot be started ({e.strerror or e}): {' '.join(command)}") from e
        self._reader = self._thread("read", self._read)
        self._logger = self._thread("log", self._copy_log)
        self._thread("write", self._write)
        self._thread("wait", self._wait)

    def _thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=target, name=f"worker-{self.pid}-{name}", daemon=True)
        thread.start()
        return thread

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """False once the process has ended."""
        return self._process.poll() is None and not self.exited.is_set()

    def send(self, **message: Any) -> None:
        """Put one JSON object on the worker's stdin; returns at once."""
        self._outbox.put(json.dumps(message).encode() + b"\n")

    def end(self, patience_s: float = 1.0) -> None:
        """End the process: close its stdin and send SIGTERM, after ``patience_s`` SIGKILL to it and its children."""
        self._outbox.put(None)
        self._process.terminate()
        if not self.exited.wait(patience_s):
            self._kill()
            self.exited.wait(_DRAIN_S * 2)

    def shut_down(self, patience_s: float = 5.0) -> None:
        """Ask the worker to leave; end it if it does not."""
        self.send(op="shutdown")
        self._outbox.put(None)
        if not self.exited.wait(patience_s):
            self.end()

    def _kill(self) -> None:
        try:
            if os.name == "posix":
                os.killpg(self.pid, signal.SIGKILL)  # its own session: group id = process id
            else:
                self._process.kill()
        except (ProcessLookupError, PermissionError):  # nothing left of it
            return

    def _write(self) -> None:
        with _open_pipe(self._process.stdin) as pipe:
            try:
                while (data := self._outbox.get()) is not None:
                    while data:
                        data = data[os.write(pipe.fileno(), data) :]
            except OSError:  # the worker is gone; the waiting thread says so
                return

    def _read(self) -> None:
        with _open_pipe(self._process.stdout) as pipe:
            while line := pipe.readline(MAX_LINE_BYTES):
                if line.strip():
                    self._take(line)
        try:
            self._process.wait(_DRAIN_S)
        except subprocess.TimeoutExpired:  # it closed its stdout but lives: it can say nothing any more
            self._kill()

    def _take(self, line: bytes) -> None:
        try:
            event = decode(line)
        except ValueError:
            self._foreign += 1
            self.log.write(b"not an event: " + line[:2000].rstrip(b"\n") + b"\n")
            if self._foreign > MAX_FOREIGN_NOTES:
                return
            shown = line[:200].decode(errors="replace").strip()
            event = Note(level="warning", text=f"the worker wrote a line that is not an event; it is ignored: {shown!r}")
        if isinstance(event, Hello):
            self.hello = event
            self.greeted.set()
        elif isinstance(event, Failed) and not self.greeted.is_set():
            self.refusal = event.message
        else:
            self._on_event(self, event)

    def _copy_log(self) -> None:
        with _open_pipe(self._process.stderr) as pipe:
            while line := pipe.readline(65_536):
                self.log.write(line)

    def _wait(self) -> None:
        self.exit_code = self._process.wait()
        self._reader.join(_DRAIN_S)  # what it wrote before its end; its children may hold the pipe longer
        self._kill()
        self._reader.join(_DRAIN_S)
        self._logger.join(_DRAIN_S)
        self._outbox.put(None)
        self.exited.set()
        self._on_exit(self)


def _open_pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise RuntimeError("the worker was started without pipes")
    return pipe
