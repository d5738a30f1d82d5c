"""The dispatcher of this machine: one runner a device, one record, one bus."""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from app.dispatch.base import DeviceStatus
from app.dispatch.bus import Bus
from app.dispatch.job import EventSink, Job, owner_mark
from app.dispatch.runner import DeviceRunner, Settings
from studio_state.errors import DeviceBusy, ModelError, SpecError, StudioError, WorkerLost
from studio_state.events import Cancelled, Event, Failed, ModelLoaded, Note, Submitted
from studio_state.experiment import ExperimentSpec
from studio_state.paths import DataDir
from studio_state.problems import Problem
from studio_state.spool import new_experiment_id


class LocalDispatch:
    """Runs experiments in worker processes on this machine; see :class:`app.dispatch.base.Dispatch`.

    Args:
        data: an opened data directory; spools and worker logs go there.
        devices: what is served, for example ``("cpu", "cuda:0")``; a worker starts with its first experiment.
        store: told of every recorded event; None on the command line.
        settings: how workers are started and ended.

    Attributes:
        host_token: cancels any experiment; for the person who started the studio.
    """

    def __init__(
        self,
        data: DataDir,
        devices: Sequence[str] = ("cpu",),
        store: EventSink | None = None,
        settings: Settings | None = None,
    ):
        self.data, self.devices = data, tuple(devices)
        self.host_token = secrets.token_urlsafe(24)
        self._store, self._settings = store, settings or Settings()
        self._bus = Bus(data)
        self._jobs: dict[str, Job] = {}
        self._guard = threading.Lock()
        self._runners = {d: DeviceRunner(d, data.root, self._settings) for d in self.devices}

    def submit(self, spec: ExperimentSpec, owner: str = "", origin: str = "studio") -> str:
        """Accept an experiment; see the protocol."""
        runner = self._runner(spec.device)
        if not self._settings.wait_for_device:
            runner.lock.check_free()
        experiment = new_experiment_id()
        job = Job(experiment, spec, owner, self.data, self._bus, self._store)
        job.record(Submitted(spec=spec, origin=origin, owner=owner_mark(owner)))
        if job.lost is not None:
            job.abandon()
            raise job.lost
        with self._guard:
            self._jobs = {i: j for i, j in self._jobs.items() if not self._bus.is_over(i)} | {experiment: job}
        try:
            runner.jobs.put(owner, job)
        except DeviceBusy as e:
            job.fail(e)
            raise
        return experiment

    def cancel_token(self, experiment: str, owner: str) -> str:
        """The token of the owner; see the protocol."""
        job = self._jobs.get(experiment)
        if job is None or job.ended:
            raise StudioError(f"experiment {experiment} is not running here; there is nothing to cancel")
        if not hmac.compare_digest(job.owner.encode(), owner.encode()):
            raise StudioError(f"experiment {experiment} was started by somebody else; only they or the host may cancel it")
        return self._token(experiment)

    def _token(self, experiment: str) -> str:
        return hmac.new(self.host_token.encode(), experiment.encode(), "sha256").hexdigest()

    def cancel(self, experiment: str, token: str) -> None:
        """Take it out of the queue or stop it; see the protocol."""
        if not any(hmac.compare_digest(token.encode(), t.encode()) for t in (self.host_token, self._token(experiment))):
            raise StudioError(f"this token does not cancel experiment {experiment}; only its owner or the host may do that")
        job = self._jobs.get(experiment)
        if job is None or job.ended:
            return
        if self._runner(job.spec.device).jobs.remove(job):
            job.record(Cancelled(message="cancelled before it began"))
        else:
            job.stop()

    def since(self, experiment: str, seq: int = 0) -> list[Event]:
        """Events recorded so far with ``seq`` or later."""
        return self._bus.since(experiment, seq)

    def follow(self, experiment: str, seq: int = 0, timeout: float | None = None) -> Iterator[Event]:
        """Events from ``seq`` on as they come; see the protocol."""
        return self._bus.follow(experiment, seq, timeout)

    def listen(self, wake: Callable[[str], None]) -> Callable[[], None]:
        """Call ``wake(experiment)`` after every batch of events; see the protocol."""
        return self._bus.listen(wake)

    def place(self, experiment: str) -> int | None:
        """0 = in hand, 1 = next, ...; None = neither queued nor running, and its last event can be read."""
        job = self._jobs.get(experiment)
        if job is None or self._bus.is_over(experiment):
            return None
        order = self._runner(job.spec.device).jobs.order()
        return order.index(job) + 1 if job in order else 0

    def status(self) -> list[DeviceStatus]:
        """Every device."""
        return [runner.status() for runner in self._runners.values()]

    def warm(self) -> None:
        """Start all workers now, so that what they can run is known and the first experiment begins sooner.

        Raises:
            WorkerLost: one cannot be started.
        """
        for runner in self._runners.values():
            runner.ensure_worker()

    def inspect(
        self, model: str, spec: ExperimentSpec | None = None, device: str | None = None, timeout: float = 120
    ) -> ModelLoaded:
        """What a model is, without running it; see the protocol."""
        runner = self._runner(device or (spec.device if spec else self.devices[0]))
        question = spec.model_dump(mode="json") if spec else None
        event = self._ask(runner, timeout, f"about model {model!r}", op="inspect", model=model, spec=question)
        if isinstance(event, ModelLoaded):
            return event
        if isinstance(event, Failed):
            if event.problems:
                raise SpecError([Problem.model_validate(p) for p in event.problems])
            raise ModelError(event.message)
        raise WorkerLost(f"the worker answered {event.line()[:200]} about model {model!r}; its version does not fit this one")

    def unload(self, device: str | None = None, timeout: float = 30) -> str:
        """Let the worker of a device drop its model; see the protocol."""
        runner = self._runner(device or self.devices[0])
        if runner.busy:
            raise DeviceBusy(
                f"device {runner.device} has an experiment in hand; unload the model when that is over, or cancel it"
            )
        if not runner.awake:
            return "no model was loaded"
        event = self._ask(runner, timeout, "when it was told to unload its model", op="unload")
        if isinstance(event, Note):
            return event.text
        raise WorkerLost(f"the worker answered {event.line()[:200]} when it was told to unload its model")

    @staticmethod
    def _ask(runner: DeviceRunner, timeout: float, about: str, **message: Any) -> Event:
        """Send a message to the worker and wait for its answer.

        Raises:
            WorkerLost: it ended or did not answer in time.
        """
        name = f"{message['op']}-{secrets.token_hex(6)}"
        answer = runner.request(name, **message)
        try:
            return answer.result(timeout)
        except TimeoutError as e:
            raise WorkerLost(f"the worker did not answer within {timeout:g} s {about}; it is busy, try again later") from e
        finally:
            runner.forget(name)

    def close(self) -> None:
        """Cancel what runs and waits, end the workers."""
        for job in list(self._jobs.values()):
            job.cancelled.set()
        closers = [threading.Thread(target=r.close) for r in self._runners.values()]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()

    def __enter__(self) -> LocalDispatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _runner(self, device: str) -> DeviceRunner:
        if device not in self._runners:
            raise SpecError(f"device {device!r} is not served here; allowed: {', '.join(self.devices)}")
        return self._runners[device]
