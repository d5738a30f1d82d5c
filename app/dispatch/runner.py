"""One device: takes experiments from its queue and sees each of them through to a terminal event."""

from __future__ import annotations

import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from app.dispatch.base import DeviceStatus
from app.dispatch.bus import is_terminal
from app.dispatch.client import WorkerClient, worker_command
from app.dispatch.device_lock import DeviceLock
from app.dispatch.fair_queue import FairQueue
from app.dispatch.job import Exit, Job, Wake
from app.dispatch.time_limit import time_limit
from app.dispatch.worker_log import WorkerLog
from studio_state.errors import DeviceBusy, StudioError, WorkerLost
from studio_state.events import Cancelled, Event, Failed, ModelLoaded, Note

log = logging.getLogger(__name__)
_BATCH = 256


@dataclass(frozen=True)
class Settings:
    """How workers are kept.

    Attributes:
        command: device -> what starts its worker.
        grace_s: from a cancel to the end of the worker that does not heed it.
        start_s: time that a worker may take to say hello.
        unload_after_s: idle time after which the worker is told to drop its model.
        wait_for_device: wait while another process has the device; else the experiment fails.
        most_s: time after which an experiment is cancelled; None = as long as it takes.
        waiting, waiting_each: experiments that may wait in all, and of one owner.
    """

    command: Callable[[str], Sequence[str]] = field(default=worker_command)
    grace_s: float = 5.0
    start_s: float = 300.0
    unload_after_s: float = 600.0
    wait_for_device: bool = True
    most_s: float | None = None
    waiting: int = 256
    waiting_each: int = 32


class DeviceRunner:
    """Owns the queue, the lock and the worker process of one device.

    Args:
        data: the data directory; the worker's log goes to a folder in it.
    """

    def __init__(self, device: str, data: Path, settings: Settings):
        self.device, self.settings, self._data = device, settings, data
        self.jobs: FairQueue[Job] = FairQueue(settings.waiting, settings.waiting_each)
        self.lock = DeviceLock(device)
        self.current: Job | None = None
        self._state = "idle"
        self._log = WorkerLog(data / "logs" / f"worker-{device.replace(':', '-')}.log")
        self._client: WorkerClient | None = None
        self._client_guard = threading.Lock()
        self._requests: dict[str, tuple[WorkerClient, Future[Event]]] = {}
        self._thread = threading.Thread(target=self._run, name=f"device-{device}", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """True while an experiment is in hand or waits."""
        return self.current is not None or len(self.jobs) > 0

    def status(self) -> DeviceStatus:
        """The device as it is now."""
        job, client, state = self.current, self._client, self._state
        return DeviceStatus(
            device=self.device,
            state=state,  # type: ignore[arg-type]
            running=job.experiment if job else None,
            queued=len(self.jobs),
            hello=client.hello if client and client.alive else None,
            message=self.lock.sentence() if state == "waiting" else "",
        )

    def close(self) -> None:
        """Cancel everything and end the worker."""
        for waiting in self.jobs.close():
            waiting.record(Cancelled(message="cancelled: the studio was closed before it began"))
        if self.current is not None:
            self.current.stop()
        self._thread.join(self.settings.grace_s + 30)
        self._end_worker()

    # -- the worker -------------------------------------------------------------------------------

    def ensure_worker(self) -> WorkerClient:
        """The living worker, started if there is none. Its hello may still be to come.

        Raises:
            WorkerLost: it cannot be started.
        """
        with self._client_guard:
            if self._client is None or not self._client.alive:
                command = self.settings.command(self.device)
                self._client = WorkerClient(command, self._log, self._on_event, self._on_exit, self._data)
            return self._client

    def request(self, name: str, **message: object) -> Future[Event]:
        """Send a message that the worker answers with ``model``, ``note`` or ``failed`` carrying ``name`` as its experiment.

        Raises:
            WorkerLost: it cannot be started.
        """
        client = self.ensure_worker()
        answer: Future[Event] = Future()
        self._requests[name] = (client, answer)
        client.send(request=name, **message)
        if client.exited.is_set():  # perhaps before the request was noted
            self._lose_requests(client)
        return answer

    @property
    def awake(self) -> bool:
        """True while there is a worker process."""
        return self._client is not None and self._client.alive

    def forget(self, name: str) -> None:
        """Nobody waits for this answer any more."""
        self._requests.pop(name, None)

    def _end_worker(self) -> None:
        if client := self._client:
            client.shut_down()

    def _on_event(self, client: WorkerClient, event: Event) -> None:
        """On the reading thread: hand an event to whom it belongs."""
        if event.experiment in self._requests:
            if isinstance(event, ModelLoaded | Note | Failed):  # before these it may tell of progress
                self._requests.pop(event.experiment)[1].set_result(event)
        elif (job := self.current) is not None and event.experiment in ("", job.experiment):
            job.inbox.put(event)
        else:
            log.info("event of no running experiment: %s", event.line()[:500])

    def _on_exit(self, client: WorkerClient) -> None:
        self._lose_requests(client)
        if job := self.current:
            job.inbox.put(Exit(client))

    def _lose_requests(self, client: WorkerClient) -> None:
        for name in [n for n, (asked, _) in list(self._requests.items()) if asked is client]:
            if (entry := self._requests.pop(name, None)) is not None:
                entry[1].set_exception(WorkerLost(obituary(client, "before it answered")))

    # -- the experiments ---------------------------------------------------------------------------

    def _run(self) -> None:
        while not self.jobs.closed:
            job = self.jobs.get(self.settings.unload_after_s)
            if job is None:
                self._drop_model()
                continue
            self.current = job
            try:
                self._serve(job)
            except StudioError as e:
                job.fail(e, self._log.tail())
            except Exception as e:  # an error of ours must end this experiment, not the queue
                log.exception("experiment %s", job.experiment)
                job.fail(f"internal error of the dispatcher: {type(e).__name__}: {e}; please report it")
                self._end_worker()
            finally:
                self.current, self._state = None, "idle"
                self.lock.release()

    def _drop_model(self) -> None:
        if self._client is not None and self.awake and not self.jobs.closed:
            self._client.send(op="unload")

    def _serve(self, job: Job) -> None:
        if job.cancelled.is_set() or not self._take_device(job):
            job.record(Cancelled(message="cancelled before it began"))
            return
        client = self._greeted_worker(job)
        if client is None:
            job.record(Cancelled(message="cancelled while the worker was being started"))
            return
        self._state = "running"
        if job.spec.isolate:
            client.send(op="unload")  # its lanes run in processes of their own, which need the memory
        client.send(op="run", experiment=job.experiment, spec=job.spec.model_dump(mode="json"))
        with time_limit(job, self.settings.most_s):
            self._see_through(job, client)

    def _take_device(self, job: Job) -> bool:
        """Lock the device; False if the job was cancelled while it waited."""
        if self.lock.acquire(0, job.experiment):
            return True
        if not self.settings.wait_for_device:
            raise DeviceBusy(f"{self.lock.sentence()}; run it again when that has finished")
        self._state = "waiting"
        job.record(Note(text=f"waiting: {self.lock.sentence()}"))
        while not job.cancelled.is_set():
            if self.lock.acquire(0.2, job.experiment):
                return True
        return False

    def _greeted_worker(self, job: Job) -> WorkerClient | None:
        """A worker that has said hello; None if the job was cancelled meanwhile."""
        client = self.ensure_worker()
        if not client.greeted.is_set():
            self._state = "starting"
            job.record(Note(text=f"starting the worker for device {self.device}"))
        deadline = time.monotonic() + self.settings.start_s
        while not client.greeted.wait(0.05):
            if job.cancelled.is_set():
                return None
            if client.exited.is_set():
                raise WorkerLost(obituary(client, "while it was starting"))
            if time.monotonic() > deadline:
                client.end()
                raise WorkerLost(f"the worker for device {self.device} did not start within {self.settings.start_s:g} s")
        return client

    def _see_through(self, job: Job, client: WorkerClient) -> None:
        """Record what the worker says until the experiment has ended, by itself or not."""
        deadline: float | None = None
        forced = False
        while not job.ended:
            if deadline is None and (job.cancelled.is_set() or job.lost):
                client.send(op="cancel", experiment=job.experiment)
                deadline = time.monotonic() + self.settings.grace_s
            batch = _next_batch(job.inbox, None if forced else deadline)
            if not batch:
                forced = True
                client.end()  # its Exit is in the inbox then
                continue
            events = [m for m in batch if isinstance(m, Event)]
            gone = any(isinstance(m, Exit) and m.client is client for m in batch)
            if job.lost is None:
                job.record(*events)
            if job.lost is not None and (gone or any(map(is_terminal, events))):
                job.fail(f"the experiment was stopped because it could not be recorded: {job.lost}")
            if gone and not job.ended:
                self._record_death(job, client, forced)

    def _record_death(self, job: Job, client: WorkerClient, forced: bool) -> None:
        if job.cancelled.is_set():
            how = f"did not stop within {self.settings.grace_s:g} s and was ended" if forced else "ended"
            job.record(Cancelled(message=f"cancelled: the worker {how}; what was measured before is kept"))
        else:
            job.fail(obituary(client, f"during the experiment (phase: {job.phase})"), client.log.tail())
        if job.lost is not None:
            job.fail(f"the experiment was stopped because it could not be recorded: {job.lost}")


_CAUSES = {
    "SIGKILL": "the system was probably out of memory, or somebody ended it; try a smaller batch, fewer lanes or a smaller model",
    "SIGTERM": "somebody ended it",
    "SIGSEGV": "a native library crashed",
    "SIGBUS": "a native library crashed",
    "SIGABRT": "a native library gave up",
}


def obituary(client: WorkerClient, when: str) -> str:
    """One sentence on why a worker ended.

    Args:
        when: ``while it was starting``.
    """
    if client.refusal:
        return client.refusal
    code, kept = client.exit_code, "what was measured before is kept"
    if code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
        return f"the worker process was ended by {name} {when}: {_CAUSES.get(name, f'see {client.log.path}')}; {kept}"
    said = f"; its last words: {client.log.last()[:300]}" if client.log.last() else ""
    return f"the worker process ended {when} with exit status {code}{said}; {kept}; log: {client.log.path}"


def _next_batch(inbox: queue.SimpleQueue[Event | Wake | Exit], deadline: float | None) -> list[Event | Wake | Exit]:
    """Everything that has come, waiting for the first message; empty when the deadline passes first."""
    batch: list[Event | Wake | Exit] = []
    wait = None if deadline is None else max(0.0, deadline - time.monotonic())
    try:
        batch.append(inbox.get(timeout=wait))
        while len(batch) < _BATCH:
            batch.append(inbox.get_nowait())
    except queue.Empty:
        return batch
    return batch
