"""What the screen and the command line may ask of whatever runs experiments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from studio_state.events import Event, Hello, ModelLoaded
from studio_state.experiment import ExperimentSpec


@dataclass(frozen=True)
class DeviceStatus:
    """One device as it is now.

    Attributes:
        state: ``idle``; ``starting`` (the worker comes up); ``waiting`` (another process has the device); ``running``.
        running: the experiment in hand, also while it waits.
        queued: experiments behind it.
        hello: what the worker said of itself; None before it was first started.
        message: a sentence, for example who has the device.
    """

    device: str
    state: Literal["idle", "starting", "waiting", "running"]
    running: str | None = None
    queued: int = 0
    hello: Hello | None = None
    message: str = ""


class Dispatch(Protocol):
    """Accepts experiments, runs them in a fair order, records and publishes what happens."""

    def submit(self, spec: ExperimentSpec, owner: str = "", origin: str = "studio") -> str:
        """Accept an experiment; returns its id. It is recorded when this returns.

        Args:
            owner: unguessable id of the session that asks; it may cancel. The record holds only a digest of it.
            origin: ``studio``, ``cli``, ``replay``.

        Raises:
            SpecError: the device is not served here.
            DeviceBusy: the queue is full, or the device is taken and waiting was not wanted.
            StoreError: it cannot be recorded.
        """
        ...

    def cancel_token(self, experiment: str, owner: str) -> str:
        """The token that cancels this experiment; the owner may ask for it again after a reload.

        Raises:
            StudioError: this is not the owner, or the experiment is not in hand.
        """
        ...

    def cancel(self, experiment: str, token: str) -> None:
        """Take it out of the queue or stop it; returns at once. Nothing happens if it has ended.

        Args:
            token: from :meth:`cancel_token`, or the host's ``host_token``.

        Raises:
            StudioError: the token does not fit.
        """
        ...

    def since(self, experiment: str, seq: int = 0) -> list[Event]:
        """Events recorded so far with ``seq`` or later."""
        ...

    def follow(self, experiment: str, seq: int = 0, timeout: float | None = None) -> Iterator[Event]:
        """Events from ``seq`` on as they come, until the experiment ends or nothing came for ``timeout`` seconds."""
        ...

    def listen(self, wake: Callable[[str], None]) -> Callable[[], None]:
        """Call ``wake(experiment)`` after every batch of events, until the returned function is called.

        ``wake`` runs on the recording thread and must return at once (set a flag, ``call_soon_threadsafe``).
        """
        ...

    def place(self, experiment: str) -> int | None:
        """0 = in hand, 1 = next, ...; None = neither queued nor running."""
        ...

    def status(self) -> list[DeviceStatus]:
        """Every device."""
        ...

    def inspect(
        self, model: str, spec: ExperimentSpec | None = None, device: str | None = None, timeout: float = 120
    ) -> ModelLoaded:
        """What a model is, and whether the experiment would fit, without running it.

        Raises:
            SpecError: the worker lists problems.
            ModelError: the model cannot be found or read.
            WorkerLost: the worker ended or did not answer in time.
        """
        ...

    def unload(self, device: str | None = None, timeout: float = 30) -> str:
        """Let the worker of a device drop its model, so that its memory is free; returns a sentence on what was done.

        Raises:
            SpecError: the device is not served here.
            DeviceBusy: an experiment runs or waits there.
            WorkerLost: the worker ended or did not answer in time.
        """
        ...

    def close(self) -> None:
        """Cancel what runs and waits, end the workers."""
        ...
