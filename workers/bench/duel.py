"""One lane against another program, back to back: a text of ours, a text of theirs, and so on.

Where a processor's clock moves within minutes, the rounds of a race of many lanes pair speeds of different clocks; here a pair lies
within a few seconds.
"""

from __future__ import annotations

from collections.abc import Callable

from studio_state.experiment import ExperimentSpec, WorkloadSpec
from studio_state.pipeline import parse_pipeline
from workers.bench.plan import Plan
from workers.environment import pick_device, use_threads
from workers.host import ModelHost
from workers.lanes import Lane
from workers.workloads.base import ItemContext
from workers.workloads.registry import make_workload

PAIRS = 36
WARM_UP = 2  # texts of ours that do not count


def duel(plan: Plan, pipeline: str, theirs: Callable[[], float], host: ModelHost) -> tuple[list[float], list[float]]:
    """Decoded tokens per second of either, :data:`PAIRS` times.

    Args:
        pipeline: of our lane, in float32.
        theirs: one run of the other program; its tokens per second.
    """
    options = {"items": 1, "prompt_tokens": plan.prompt_tokens, "new_tokens": plan.new_tokens}
    workload, lane = WorkloadSpec(id="speed", options=options), parse_pipeline(pipeline)
    spec = ExperimentSpec(model=plan.model, workload=workload, lanes=(lane,), dtype="float32", threads=plan.threads)
    info, device = host.inspect(spec), pick_device(spec.device)
    use_threads(spec.threads)
    session, _ = host.open(spec, info, device)
    items = make_workload(workload).make_items(ItemContext(session.processor, spec.seed, info.context))
    found: tuple[list[float], list[float]] = ([], [])
    with session.closing(), Lane(0, lane, session).attached_for(lambda policy: True):
        for number in range(WARM_UP + PAIRS):
            trace = session.family.begin(session, items)
            steps = [step.seconds for step in session.family.run(session, trace)][1:]
            if number >= WARM_UP:
                found[0].append(len(steps) / sum(steps))
                found[1].append(theirs())
    return found
