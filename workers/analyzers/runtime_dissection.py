"""Dissecting the runtime: where the time of a step goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Any, ClassVar

from studio_state.catalog import Card
from workers.analyzer import Analyzer, Measured
from workers.cards import knob
from workers.mechanisms.operator_times import OperatorTimes, recording
from workers.mechanisms.phases import Phase, ShortRun
from workers.methods import card
from workers.session import Session


class RuntimeDissection(Analyzer):
    """Where the time of a step goes, by kind of operation.

    Zhang et al. 2023, arXiv:2311.03687, sections 3 to 5, dissect end to end, by module and by operator. Here every lane's steps are
    recorded operator by operator in passes of their own, untimed otherwise, and added up by what the operators do; steps by the
    library's modules and by lean blocks are thereby told in the same words. Times are scaled to those of unrecorded steps. By
    module only the layers are told from the rest, in passes of their own again, where the library's modules run.
    """

    card: ClassVar[Card] = card(
        id="runtime-dissection",
        title="Where the time goes",
        paper="arXiv:2311.03687",
        kind="analyzer",
        families=("llm", "vlm", "vit", "diffusion"),
    )
    repeats: int = knob(3, ge=1, le=20, help="passes of each kind; more = steadier")

    def analyze(self, run: ShortRun) -> dict[str, Any]:
        """Seconds of one step in each phase, by kind of operation."""
        return {"phases": {phase: self.step(run, phase) for phase in run.phases}}

    def step(self, run: ShortRun, phase: Phase) -> dict[str, Any]:
        """Of one phase."""
        with run.ready():
            times = [_timed(run, phase) for _ in range(self.repeats)]
            layers = [share for _ in range(self.repeats) if (share := _inside_layers(run, phase))]
        seconds, steps = min(times)
        recorded = [_recorded(run, phase, seconds) for _ in range(self.repeats)]
        one = recorded[0]
        return {
            "steps": steps,
            "seconds": seconds / steps,
            "kinds": {k: fmean(r.seconds[k] for r in recorded) / steps for k in one.seconds},
            "operators": [[name, calls / steps, s / steps] for name, calls, s in one.operators],
            "slowed": one.slowed,
            "products": [r.seconds["products"] / seconds for r in recorded],
            "layers": layers,
        }

    def metrics(self, data: dict[str, Any]) -> Iterator[Measured]:
        """What share of a step products and layers have."""
        for phase, found in data["phases"].items():
            start = "prefill_" if phase == "prefill" else ""
            for name in ("products", "layers"):
                if found[name]:
                    yield Measured(f"{start}{name}_share", tuple(found[name]))


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


def _inside_layers(run: ShortRun, phase: Phase) -> float:
    """Share of the phase that the forwards of the model's layers take; 0 where other code runs them."""
    shares: list[float] = []
    with _layers_timed(run.session) as inside:

        def around(work: Callable[[], float]) -> None:
            inside.clear()
            seconds = work()
            shares.append(sum(inside) / seconds)

        run.each(phase, around)
    return min(1.0, shares[0])


@contextmanager
def _layers_timed(session: Session) -> Iterator[list[float]]:
    """While open, the seconds of every layer's forward are added to the list."""
    inside: list[float] = []
    began: list[float] = []

    def before(*_: Any) -> None:
        began.append(session.clock())

    def after(*_: Any) -> None:
        inside.append(session.clock() - began.pop())

    with ExitStack() as stack:
        for name in session.family.parts(session.model).get("layers", []):
            module = session.model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield inside
