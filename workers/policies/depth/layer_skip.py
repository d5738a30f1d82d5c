"""Leaving out layers."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.methods import Policy, card, knob
from workers.session import Session


class LayerSkip(Policy):
    """Leave out a run of layers: the hidden state passes them by unchanged.

    Gromov et al. 2024, arXiv:2403.17887, section 2: consecutive deep layers change the hidden state least. Deviations:
    where to begin is a knob instead of the smallest angular distance, and nothing is trained afterwards. In a
    vision-language model the layers are those of the language model.
    """

    card: ClassVar[Card] = card(
        id="layer-skip",
        title="Layer skipping",
        paper="arXiv:2403.17887",
        stage="depth",
        families=("llm", "vlm", "vit"),
        owns=("residual.depth",),
        spoils=("kv.uniform",),
        effects={"kv_bytes": "down"},
        hopes={"decode_tokens_per_s": "up", "ttft_s": "down", "images_per_s": "up"},
        neutral={"count": 0},
    )
    start: float = knob(
        0.6,
        ge=0.0,
        le=1.0,
        help="where the run begins, as a share of the depth (sooner where it would not fit); deeper = less damage",
    )
    count: int = knob(1, ge=0, le=100, fits="layers", help="layers left out; more = faster, worse")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Have the layers hand on what they are given."""
        names = session.family.parts(session.model)["layers"]
        first = max(0, min(int(self.start * len(names)), len(names) - self.count))
        skipped = names[first : first + self.count]

        def pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            session.did(self.card.id)
            return hidden_states

        return session.rerouted(dict.fromkeys(skipped, pass_on)) if skipped else ExitStack()
