"""One lane of a race: its policies, its samples, how it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

from studio_state.events import Event, LaneFinished, LaneStatus, Metric
from studio_state.metrics import Source
from studio_state.pipeline import Pipeline
from workers.methods import Policy, effective
from workers.session import Session
from workers.workloads.base import Grade, ItemResult

Key = tuple[str, int]  # (item, repeat)


@dataclass
class Lane:
    """State of one lane while its experiment runs.

    Attributes:
        policies: in the order in which they act.
        samples: metric name -> (item, repeat) -> value.
        given: metric name -> value of the lane as a whole.
        results, grades: what came out, one per item of the first repeat.
        acted: policy id -> how much it did.
        status: None while the lane runs.
    """

    index: int
    pipeline: Pipeline
    session: Session
    policies: list[Policy] = field(default_factory=list)
    samples: dict[str, dict[Key, float]] = field(default_factory=dict)
    given: dict[str, float] = field(default_factory=dict)
    results: list[ItemResult] = field(default_factory=list)
    grades: list[Grade] = field(default_factory=list)
    acted: dict[str, float] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    status: LaneStatus | None = None
    message: str = ""
    interleaved: bool = True

    def __post_init__(self) -> None:
        self.policies = effective(self.pipeline)

    @property
    def order(self) -> str:
        """The effective pipeline in one line."""
        return Pipeline(steps=tuple(s for p in self.policies for s in self.pipeline.steps if s.policy == p.card.id)).text()

    @contextmanager
    def attached(self, prepare: bool = False, wanted: Callable[[Policy], bool] = lambda policy: True) -> Iterator[None]:
        """The lane's policies on the session; everything undone on the way out.

        Args:
            prepare: let every policy build what it needs, while those before it are attached.
            wanted: which policies; all by default.
        """
        with ExitStack() as stack:
            stack.enter_context(self.session.having(acted=self.acted))
            for policy in filter(wanted, self.policies):
                if prepare:
                    policy.prepare(self.session)
                stack.enter_context(policy.attach(self.session))
            yield

    def attached_for(self, wanted: Callable[[Policy], bool]) -> AbstractContextManager[None]:
        """Some of the lane's policies on the session."""
        return self.attached(prepare=True, wanted=wanted)

    def sample(self, name: str, value: float, item: str, repeat: int = 0) -> Metric:
        """Keep a value of one item, and the event that tells it."""
        self.samples.setdefault(name, {})[item, repeat] = value
        return Metric(lane=self.index, name=name, value=value, item=item, repeat=repeat)

    def whole(self, name: str, value: float, source: Source = "measured", n: int | None = None) -> Metric:
        """Keep a value of the lane as a whole, and the event that tells it."""
        self.given[name] = value
        return Metric(lane=self.index, name=name, value=value, source=source, n=n)

    def give_up(self, status: LaneStatus, message: str) -> None:
        """The lane ends before its time; what it measured stays."""
        if self.status is None:
            self.status, self.message = status, message

    def farewell(self) -> Iterator[Event]:
        """The lane's last event."""
        yield LaneFinished(
            lane=self.index,
            status=self.status or "finished",
            flags=self.flags,
            message=self.message,
            interleaved=self.interleaved,
        )

    def check_effect(self) -> None:
        """Flag every policy that changed nothing although its knobs ask for something."""
        for policy in self.policies:
            if not policy.is_neutral and not self.acted.get(policy.card.id):
                self.flags.append(f"no effect: {policy.why_idle(self.session)}")


def live(lanes: Sequence[Lane]) -> list[Lane]:
    """Lanes that still run."""
    return [lane for lane in lanes if lane.status is None]
