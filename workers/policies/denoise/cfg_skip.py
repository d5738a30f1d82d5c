"""Guidance at a share of the steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.denoising import Denoising, denoising
from workers.mechanisms.guidance import conditional_half, guided_steps, prediction, with_prediction
from workers.methods import Policy, card, knob
from workers.session import Session


class GuidanceSkipping(Policy):
    """Keep classifier-free guidance for a share of the denoising steps; at the others only the conditional half runs.

    Kynkäänniemi et al. 2024, arXiv:2404.07724: guidance helps in the middle of the way only (``where`` = middle, ``then`` =
    none). Castillo et al. 2023, arXiv:2312.12487: late steps do without it (first, none), and an unconditional output can
    be estimated from those of earlier steps (reuse). ``every`` spreads the steps evenly. Deviations: the papers set noise
    levels, or watch how alike the two outputs are, where here a share of the steps is set; the estimate is the plainest
    one, the conditional output minus the last computed difference. A step before the first guided one has no difference
    yet and runs without guidance. The pipeline gets both halves at every step, so that its own arithmetic goes on.
    """

    card: ClassVar[Card] = card(
        id="cfg-skip",
        title="Guidance skipping",
        paper="arXiv:2404.07724",
        stage="denoise",
        families=("diffusion",),
        traits=("guided",),
        workloads=("generate-images",),
        owns=("denoise.guidance",),
        spoils=("denoise.rows",),
        effects={"guided_steps": "down"},
        hopes={"seconds_per_image": "down"},
        neutral={"keep": 1.0},
    )
    keep: float = knob(0.5, ge=0.05, le=1.0, help="share of steps with full guidance, at least one step; lower = faster")
    where: Literal["first", "middle", "every"] = knob(
        "first", help="which steps keep it: the first ones, the middle ones, or evenly spaced ones that begin with the first"
    )
    then: Literal["reuse", "none"] = knob(
        "none", help="at the other steps: reuse = the last computed difference between the halves, none = no guidance"
    )

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Give the denoiser one half where the other is left out."""
        if self.is_neutral:
            return nullcontext()
        model: Any = session.model
        plain = model.denoiser.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            state = denoising(session)
            if not state.guided:
                return plain(*args, **kwargs)
            session.once((GuidanceSkipping, "guided"), lambda: True)
            return self._guided(session, state, plain, args, kwargs)

        return session.rerouted({model.denoiser_name: forward})

    def _guided(self, session: Session, state: Denoising, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One run of the denoiser: the pipeline's doubled output [2B, C, H, W], computed or rebuilt from its half."""
        if state.step in guided_steps(self.where, self.keep, state.of):
            out = plain(*args, **kwargs)
            session.count("guided_steps", 1.0)
            if self.then == "reuse":
                conditional, unconditional = state.halves(prediction(out))
                state.kept[self.card.id] = conditional - unconditional
            return out
        args, kwargs = conditional_half((args, kwargs), state)
        out = plain(*args, **kwargs)
        session.did(self.card.id)
        conditional = prediction(out)
        difference: Tensor | None = state.kept.get(self.card.id)
        unconditional = conditional if difference is None else conditional - difference
        return with_prediction(out, state.joined(conditional, unconditional))

    def why_idle(self, session: Session) -> str:
        """There was no guidance to leave out, or the share rounds to all steps."""
        if (GuidanceSkipping, "guided") not in session.built:
            return f"{self.card.title} found nothing to skip: guidance is 1; set guidance above 1"
        return f"{self.card.title} left guidance at every step: the share rounds to all of them; lower keep or ask for more steps"
