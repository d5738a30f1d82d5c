"""Experiments without a time in them: as many lanes as wanted, one after the other, neither warmed up nor weighed in passes of
their own.

They run through the engine's own race, so that the numbers are the studio's; what is left out is what only times need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from studio_state.errors import SpecError, StudioError
from studio_state.experiment import ExperimentSpec
from studio_state.pipeline import Pipeline
from studio_state.problems import problems
from workers.engine import batched
from workers.environment import pick_device, use_threads
from workers.families.labels import labels_of
from workers.host import ModelHost
from workers.lanes import Lane
from workers.meters.summary import summarize
from workers.methods import catalogue
from workers.race import Race
from workers.session import Session
from workers.workloads.base import ItemContext
from workers.workloads.registry import make_workload


def prepared(session: Session, lane: Lane) -> None:
    """Have the lane's policies build what they need."""
    with lane.attached(prepare=True):
        pass


class Untimed:
    """Lanes on one model and workload, each run when it is asked for.

    Attributes:
        base: the baseline's lane; run it first.
        lanes: the others, in the order given.
    """

    def __init__(self, spec: ExperimentSpec, host: ModelHost, pipelines: Sequence[Pipeline], compared: bool = True):
        """Load the model, unless the host holds it.

        Args:
            spec: the experiment of the baseline; one takes fewer lanes than there may be here.
            compared: have every lane follow the baseline's outputs, for the distances; half of the time where texts are generated.

        Raises:
            StudioError: the model or the workload's items cannot be had.
        """
        self.spec, self.host, self.compared, self.info = spec, host, compared, host.inspect(spec)
        use_threads(spec.threads)
        self.session = host.open(spec, self.info, pick_device(spec.device))[0]
        workload = make_workload(spec.workload)
        context = ItemContext(self.session.processor, spec.seed, self.info.context, labels_of(self.session.model))
        self.batches = list(batched(workload.make_items(context), spec.batch))
        self.race = Race(self.session, workload, [Lane(i, p, self.session) for i, p in enumerate((Pipeline(), *pipelines))])
        self.base, *self.lanes = self.race.lanes

    def run(self, lane: Lane, build: Callable[[Session, Lane], None] = prepared) -> dict[str, float]:
        """Build a lane, run it over all items, let it go.

        Args:
            build: has the lane's policies prepared; one of the caller's own may look at what they made.

        Returns:
            metric -> value of the lane.

        Raises:
            StudioError: the lane does not fit the model, or it failed; the others are not touched by this.
        """
        try:
            asked = self.spec.model_copy(update={"lanes": (Pipeline(), lane.pipeline)})
            if found := problems(asked, catalogue(), self.info, self.host.unavailable()):
                raise SpecError(found)
            with self.session.closing(), self.race.block([lane], interleaved=False):
                build(self.session, lane)
                for _ in self.race.run(self.batches):
                    pass
        except StudioError as e:
            lane.give_up("failed", str(e))
            raise
        if not self.compared:
            self.race.references.clear()
        if lane.status is not None:
            raise StudioError(lane.message)
        for _ in summarize([self.base] if lane is self.base else [self.base, lane], self.race.workload, 0):
            pass
        return lane.given
