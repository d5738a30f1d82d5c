"""Fewer denoising steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

from torch import nn

from studio_state.catalog import Card
from workers.mechanisms.denoising import denoising
from workers.methods import Policy, card, catalogue, knob
from workers.session import Session


class FewerSteps(Policy):
    """Run a share of the denoising steps that are asked for; the scheduler spaces them over the whole way.

    Folklore, and the measure of every method that reuses earlier steps: whatever a cache saves, this saves too, and
    the picture of a run that was asked for so few steps in the first place is exactly what comes out. The number of
    steps is rounded to the nearest whole one, and at least one step runs.
    """

    card: ClassVar[Card] = card(
        id="fewer-steps",
        title="Fewer steps",
        stage="denoise",
        families=("diffusion",),
        workloads=("generate-images",),
        owns=("denoise.schedule",),
        effects={"denoising_steps": "down"},
        hopes={"seconds_per_image": "down"},
        neutral={"keep": 1.0},
    )
    keep: float = knob(0.5, ge=0.05, le=1.0, help="share of the denoising steps that run; lower = faster, coarser")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Ask for fewer steps."""
        return nullcontext() if self.is_neutral else self._shortened(session)

    @contextmanager
    def _shortened(self, session: Session) -> Iterator[None]:
        model: Any = session.model
        asked = self._asked(session)

        def called(module: nn.Module, args: Any, out: Any) -> None:
            left_out = asked - int(model.pipeline.scheduler.num_inference_steps)
            if left_out > 0:  # once a batch
                denoising(session).keep(self.card.id, lambda: session.did(self.card.id, left_out))

        handle = model.denoiser.register_forward_hook(called)
        try:
            with session.having(step_share=self.keep):
                yield
        finally:
            handle.remove()

    def _asked(self, session: Session) -> int:
        """Steps that the workload asks for; 0 where it knows no steps."""
        spec = session.spec.workload

        def find() -> int:
            found = catalogue().workload_by_id.get(spec.id)
            return int({**(found.defaults() if found else {}), **spec.options}.get("steps", 0))

        steps: int = session.once((FewerSteps, spec.id), find)
        return steps

    def why_idle(self, session: Session) -> str:
        """So few steps are asked for that the share rounds to all of them."""
        asked = self._asked(session)
        return f"{self.card.title} left out no step: {self.keep:g} of {asked} rounds to {asked}; lower keep or ask for more steps"
