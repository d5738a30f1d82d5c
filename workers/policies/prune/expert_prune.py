"""Expert pruning."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from studio_state.catalog import Card
from workers.mechanisms.expert_scores import expert_scores
from workers.mechanisms.experts import known_blocks, without_experts
from workers.methods import Policy, card, knob
from workers.session import Session


class ExpertPrune(Policy):
    """Take out the experts of each layer that a text calls on least; their weights go.

    Muzio et al. 2024 (SEER-MoE), arXiv:2404.05089, first stage: experts are ranked by how often tokens are sent to them
    (``frequency``) or by the sum of the router's weights (``weight``). ``output`` is the score of Lasby et al. 2025 (REAP),
    arXiv:2510.13999: the mean, over the tokens sent to an expert, of the router's weight times the norm of its output.
    Deviations: every layer keeps the same number, and nothing is trained afterwards. Related: Lu et al. 2024, arXiv:2402.14800,
    try all sets of experts for the smallest change of a layer's output; Chen et al. 2022, arXiv:2206.00277, drop experts while
    they fine-tune.

    The text is the end of Jane Austen's *Persuasion*, which no workload measures on. Where fewer experts are left than a
    token visits, it visits all of them. Calibrating needs the whole model, so this alone makes no model fit that does not.
    """

    card: ClassVar[Card] = card(
        id="expert-prune",
        title="Expert pruning",
        paper="arXiv:2404.05089",
        stage="prune",
        families=("llm",),
        traits=("moe",),
        owns=("experts.weights",),
        effects={"weight_bytes": "down", "experts_used": "down"},
        hopes={"prefill_tokens_per_s": "up"},
        neutral={"keep": 1.0},
        alters_weights=True,
    )
    keep: float = knob(
        0.5, ge=0.01, le=1.0, help="share of the experts of each layer that stay, one at least; lower = smaller, worse"
    )
    score: Literal["frequency", "weight", "output"] = knob(
        "frequency",
        help="what ranks experts: tokens sent to them, weight given to them, or weight times the size of what they put out",
    )
    tokens: int = knob(2048, ge=64, le=8192, help="tokens of the text that ranks them; more = steadier, slower to build")

    def prepare(self, session: Session) -> None:
        """Rank the experts and copy those that stay."""
        self._modules(session)

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Put the smaller mixtures in.

        Raises:
            Unavailable: the model has no mixture of experts that is known.
        """
        modules = self._modules(session)
        if modules:
            session.did(self.card.id, sum(b.count - self._left(b.count) for b in known_blocks(session)))
        return session.swapped(modules)

    def _left(self, count: int) -> int:
        """How many of so many experts stay."""
        return max(1, round(self.keep * count))

    def _modules(self, session: Session) -> dict[str, nn.Module]:
        """What stands in for routers and experts; built once for the model as earlier policies left it."""
        if all(self._left(b.count) == b.count for b in known_blocks(session)):
            return {}
        key = (self, *session.model.modules())
        modules: dict[str, nn.Module] = session.once(key, lambda: self._build(session))
        return modules

    def _build(self, session: Session) -> dict[str, nn.Module]:
        scores = expert_scores(session, self.score, self.tokens, self.card.title)
        return without_experts(session, {b: best(scores[b], self._left(b.count)) for b in known_blocks(session)})

    def why_idle(self, session: Session) -> str:
        """Why no expert was taken out."""
        return f"{self.card.title}: keep = {self.keep} leaves all experts of every layer; lower it"


def best(scores: Tensor, count: int) -> Tensor:
    """The experts with the highest scores [count], ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values
