"""The race: the only loop over lanes and items.

Lanes never run at the same time. Their order rotates from item to item (ABC, BCA, ...), so that
slow drifts of the machine hit all alike, and ratios are formed from neighbours. Events are
emitted between steps, outside every timed interval.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator

from studio_state.errors import SpecError, StudioError
from studio_state.events import (
    Cancelled as CancelledEvent,
)
from studio_state.events import (
    Event,
    Failed,
    Finished,
    LaneFinished,
    ModelLoaded,
    Note,
    Phase,
    Started,
)
from studio_state.experiment import ExperimentSpec
from studio_state.problems import problems
from workers import plan
from workers.environment import environment, pick_device, use_threads
from workers.families.labels import labels_of
from workers.host import ModelHost
from workers.isolate import run_isolated
from workers.lanes import Lane
from workers.methods import catalogue, effective
from workers.race import Race
from workers.session import Cancelled, Session
from workers.workloads.base import Item, ItemContext
from workers.workloads.registry import make_workload


def run(
    spec: ExperimentSpec,
    host: ModelHost | None = None,
    is_cancelled: Callable[[], bool] = lambda: False,
    say: Callable[[Event], None] = lambda event: None,
) -> Iterator[Event]:
    """Run an experiment and tell what happens; the last event is Finished, Failed or Cancelled.

    Args:
        host: keeps the loaded model between experiments; a fresh one by default.
        is_cancelled: asked between steps.
        say: gets progress events that arise inside a long call (loading), at once.
    """
    began = time.time()
    try:
        if spec.isolate and len(spec.lanes) > 2:
            yield from run_isolated(spec, is_cancelled)
            return
        yield from _run(spec, host or ModelHost(), is_cancelled, say)
        yield Finished(seconds=time.time() - began)
    except Cancelled:
        yield CancelledEvent(message="cancelled; what was measured before stays")
    except SpecError as e:
        yield Failed(message=str(e), phase="check", problems=[p.model_dump(mode="json") for p in e.problems])
    except StudioError as e:
        yield Failed(message=str(e), phase="setup", detail=traceback.format_exc())
    except MemoryError:
        yield Failed(
            message="the machine ran out of memory; use a smaller model, batch or prompt",
            phase="run",
            detail=traceback.format_exc(),
        )
    except Exception as e:
        yield Failed(
            message=f"the worker met an error it did not expect: {type(e).__name__}: {e}",
            phase="run",
            detail=traceback.format_exc(),
        )


def _run(
    spec: ExperimentSpec, host: ModelHost, is_cancelled: Callable[[], bool], say: Callable[[Event], None]
) -> Iterator[Event]:
    device = pick_device(spec.device)
    use_threads(spec.threads)
    yield Started(environment=environment(device))
    info = host.inspect(spec, lambda text, done: say(Phase(name="fetch", done=done, text=text)))
    found = problems(spec, catalogue(), info, host.unavailable())
    if found:
        raise SpecError(found)
    pipelines = [effective(p) for p in spec.lanes]
    drafts = host.companions(pipelines, progress=lambda text, done: say(Phase(name="fetch", done=done, text=text)))
    needs = plan.needs(spec, info, device, drafts)
    fitting = [needs.lane(policies).fits for policies in pipelines]
    yield ModelLoaded(info=info, estimate=needs.told(pipelines), fits_baseline=fitting[0])
    if not any(fitting):
        raise StudioError(plan.too_large(info, needs.baseline))

    def ready(session: Session) -> Session:
        session.is_cancelled, session.say = is_cancelled, Progress(say)
        return session

    yield Phase(name="load", text=f"loading {info.name}")
    if fitting[0]:
        session, seconds = host.open(spec, info, device)
        yield from _race(spec, ready(session), needs, fitting, seconds)
        return
    whole = [plan.needs_whole_model(info, policies) for policies in pipelines]
    can = [fits and not why for fits, why in zip(fitting, whole, strict=True)]
    if not any(can):
        raise StudioError(next(why for fits, why in zip(fitting, whole, strict=True) if fits))
    for index in [i for i, runs in enumerate(can) if not runs]:  # each lane is packed while it loads, and runs alone
        why = whole[index] if fitting[index] else plan.lane_too_large(info, needs, index, pipelines[index])
        yield LaneFinished(lane=index, status="unavailable", message=why)
    for index in [i for i, runs in enumerate(can) if runs]:
        session, seconds = host.open_compressed(spec, info, device, pipelines[index], Progress(say))
        alone = [i == index for i in range(len(can))]
        yield from _race(spec, ready(session), needs, alone, seconds, together=False)
        host.unload()


def _race(
    spec: ExperimentSpec,
    session: Session,
    needs: plan.Needs,
    running: list[bool],
    load_seconds: float,
    together: bool | None = None,
) -> Iterator[Event]:
    """Lanes on one session.

    Args:
        running: which lanes take part; of the others is told elsewhere.
        together: interleave the lanes; None = where they fit into memory at the same time.
    """
    workload = make_workload(spec.workload)
    items = workload.make_items(ItemContext(session.processor, spec.seed, session.info.context, labels_of(session.model)))
    batches = list(batched(items, spec.batch))
    race = Race(session, workload, [Lane(i, p, session) for i, p in enumerate(spec.lanes)])
    for lane, takes_part in zip(race.lanes, running, strict=True):
        if not takes_part:
            lane.give_up("unavailable", plan.lane_too_large(session.info, needs, lane.index, lane.policies))
            if running[0]:
                yield from lane.farewell()
    lanes = race.live()
    if together is None:
        together = needs.fit_together([lane.policies for lane in lanes])
        if not together:
            yield Note(
                text="the lanes do not fit into memory together: they run one after the other, not interleaved", level="warning"
            )
    for block in [lanes] if together else [[lane] for lane in lanes]:
        with session.closing(), race.block(block, together):
            yield from race.prepare(load_seconds, items[0])
            yield from race.run(batches)
            yield from race.measure_memory(batches)
            yield from race.analyze(batches)
    yield from race.finish()


class Progress:
    """Progress of a long build as events, at most five a second."""

    def __init__(self, say: Callable[[Event], None]):
        self.say, self.last = say, 0.0

    def __call__(self, text: str, done: float | None) -> None:
        """Tell it, or leave it out if the last one was told just now."""
        if time.monotonic() - self.last >= 0.2:
            self.last = time.monotonic()
            self.say(Phase(name="build", done=done, text=text))


def batched(items: list[Item], size: int) -> Iterator[list[Item]]:
    """Items in batches of one task; likelihood tasks run one by one."""
    run: list[Item] = []
    for item in items:
        if run and (len(run) >= size or item.task != run[0].task or item.task not in ("generate", "classify", "draw")):
            yield run
            run = []
        run.append(item)
    if run:
        yield run
