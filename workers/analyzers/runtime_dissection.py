"""Dissecting the runtime: where the time of a step goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from studio_state.catalog import Card
from workers.analyzer import Analyzer
from workers.cards import knob
from workers.mechanisms.operator_times import OperatorTimes, recording
from workers.mechanisms.phases import Phase, ShortRun
from workers.methods import card


class RuntimeDissection(Analyzer):
    """Where the time of a step goes, by kind of operation.

    Zhang et al. 2023, arXiv:2311.03687, sections 3 to 5, dissect end to end, by module and by operator. Here every lane's steps are
    recorded operator by operator in a pass of its own, untimed otherwise, and added up by what the operators do; steps by the
    library's modules and by lean blocks are thereby told in the same words. Times are scaled to those of unrecorded steps.
    """

    card: ClassVar[Card] = card(
        id="runtime-dissection",
        title="Where the time goes",
        paper="arXiv:2311.03687",
        kind="analyzer",
        families=("llm", "vlm", "vit", "diffusion"),
    )
    repeats: int = knob(2, ge=1, le=20, help="unrecorded runs, of which the fastest counts; more = steadier")

    def analyze(self, run: ShortRun) -> dict[str, Any]:
        """Seconds of one step in each phase, by kind of operation."""
        found = {}
        for phase in run.phases:
            with run.ready():
                times = [_timed(run, phase) for _ in range(self.repeats)]
            seconds, steps = min(times)
            one = _recorded(run, phase, seconds)
            found[phase] = {
                "steps": steps,
                "seconds": seconds / steps,
                "kinds": {k: v / steps for k, v in one.seconds.items()},
                "operators": [[name, calls / steps, s / steps] for name, calls, s in one.operators],
                "slowed": one.slowed,
            }
        return {"phases": found}


def _timed(run: ShortRun, phase: Phase) -> tuple[float, int]:
    seconds: list[float] = []

    def around(work: Callable[[], float]) -> None:
        seconds.append(work())

    steps = run.each(phase, around)
    return seconds[0], max(1, steps)


def _recorded(run: ShortRun, phase: Phase, seconds: float) -> OperatorTimes:
    found: list[OperatorTimes] = []
    with recording() as recorder, run.ready():
        run.each(phase, lambda work: found.append(recorder.run(work, seconds)))
    return found[0]
