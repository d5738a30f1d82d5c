"""A short run of a lane in its phases, for analyzers: the prompt and the tokens after it, or one pass over images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from workers.families.base import StepResult
from workers.methods import Policy
from workers.session import Session
from workers.workloads.base import Item

Phase = Literal["prefill", "decode", "pass"]
NEW_TOKENS = 9  # the prefill's and eight steps
PHASES: dict[Phase, str] = {"prefill": "reading the prompt", "decode": "one decode step", "pass": "one pass"}
OWN_LOOP = ("decode", "runtime")  # stages whose policies run other code than the library's modules
Attach = Callable[[Callable[[Policy], bool]], AbstractContextManager[None]]


@dataclass
class ShortRun:
    """What analyzers are given.

    Attributes:
        attach: the lane's policies on the session, those that the given function lets through.
        items: one batch.
    """

    session: Session
    attach: Attach
    items: Sequence[Item]

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those that this kind of item has."""
        return ("pass",) if self.items[0].task in ("classify", "draw") else ("prefill", "decode")

    @contextmanager
    def ready(self, wanted: Callable[[Policy], bool] = lambda policy: True) -> Iterator[None]:
        """The lane as it is measured, with few new tokens."""
        spec = self.session.spec.model_copy(update={"max_new_tokens": NEW_TOKENS})
        with self.attach(wanted), self.session.having(spec=spec):
            yield

    def steps(self) -> Iterator[StepResult]:
        """Run the items."""
        items = [replace(i, max_new_tokens=NEW_TOKENS, ignore_eos=True) for i in self.items]
        trace = self.session.family.begin(self.session, items)
        for step in self.session.family.run(self.session, trace):
            self.session.check_cancelled()
            yield step

    def each(self, phase: Phase, around: Callable[[Callable[[], float]], None]) -> int:
        """Run the items, handing over the work of one phase: a function that does it and returns its seconds.

        Returns:
            Steps in that phase.
        """
        steps, count = self.steps(), [0]

        def work() -> float:
            seconds = 0.0
            for step in steps:
                seconds += step.seconds
                count[0] += 1
                if phase == "prefill":
                    break
            return seconds

        if phase == "decode":
            next(steps)
        around(work)
        steps.close()  # type: ignore[attr-defined]
        return count[0]


def library_runs_it(policy: Policy) -> bool:
    """Whether a policy leaves the library's own modules at work, on which counting looks on."""
    return policy.card.stage not in OWN_LOOP
