"""Fewer experts a token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

from torch import Tensor

from studio_state.catalog import Card
from studio_state.errors import SpecError
from workers.mechanisms.experts import RouterCall, known_blocks, leaving_out, routed
from workers.methods import Policy, card, knob
from workers.session import Session


class TopKExperts(Policy):
    """Let every token visit fewer of the experts that its router chose, or only those that weigh enough beside the first.

    Lu et al. 2024, arXiv:2402.14800, dynamic expert skipping: the second expert of a token is left out where its weight is
    below a threshold times the first one's, and the weights that stay are normalised. Deviations: the threshold is a knob,
    the same in all layers, not each layer's median on a calibration text; where a model's tokens visit more than two
    experts, each is compared with the first; normalising keeps the sum of the weights, which is not 1 in every model. A
    fixed number of experts (``top_k``) is folklore: the model's own setting, lowered without training.
    """

    card: ClassVar[Card] = card(
        id="top-k-experts",
        title="Fewer experts a token",
        paper="arXiv:2402.14800",
        stage="sparsity",
        families=("llm",),
        traits=("moe",),
        owns=("experts.routing",),
        effects={"expert_top_k": "down"},
        hopes={"prefill_tokens_per_s": "up", "decode_tokens_per_s": "up"},
        neutral={"top_k": 0, "threshold": 0.0},
    )
    top_k: int = knob(
        1, ge=0, le=64, help="experts a token visits at most; fewer = faster, worse; 0 = as many as the model has it"
    )
    threshold: float = knob(
        0.0,
        ge=0.0,
        le=1.0,
        help="leave an expert out where its weight is below this share of the token's first; more = faster, worse; 0 = never",
    )
    renormalise: bool = knob(
        True, help="the experts that stay take over the weight of those left out; off = the layer's output shrinks"
    )

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Choose among what the routers choose.

        Raises:
            SpecError: more experts than the model's tokens visit.
            Unavailable: the model has no mixture of experts that is known.
        """
        most = max(b.top_k for b in known_blocks(session))
        if self.top_k > most:
            raise SpecError(
                f"{self.card.id}: top_k = {self.top_k}, but tokens of {session.info.name} visit {most} experts; "
                f"choose at most {most}, or 0 for the model's own"
            )
        return self._choosing(session) if self.threshold or 0 < self.top_k < most else nullcontext()

    @contextmanager
    def _choosing(self, session: Session) -> Iterator[None]:
        gone: list[int | Tensor] = [0]  # visits; the device is asked for the number at the end

        def choose(call: RouterCall) -> None:
            indices, weights = call.indices, call.weights
            if self.top_k:
                indices, weights = indices[:, : self.top_k], weights[:, : self.top_k]
                gone[0] = gone[0] + call.indices.numel() - indices.numel()
            if self.threshold:
                light = weights < self.threshold * weights[:, :1]
                indices, weights = indices.masked_fill(light, call.count), weights.masked_fill(light, 0)
                gone[0] = gone[0] + light.sum()
            if self.renormalise:
                weights = weights * (call.weights.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True))
            call.indices, call.weights = indices, weights

        with ExitStack() as stack:
            stack.enter_context(routed(session, choose))
            if self.threshold:
                stack.enter_context(leaving_out(session))
            yield
        session.did(self.card.id, float(gone[0]))

    def why_idle(self, session: Session) -> str:
        """Why no visit was left out."""
        own = max(b.top_k for b in known_blocks(session))
        return (
            f"{self.card.title} left no visit out; the model's tokens visit {own} experts, and no weight was below the threshold"
        )
