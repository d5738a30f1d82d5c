"""H2O."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import budgets, column_sums, evicting, keep_best
from workers.methods import Policy, card, knob
from workers.session import Session

SUMS = "h2o"  # name of the running sums in HeadGroup.tracked


class H2O(Policy):
    """Keep the positions that gathered most attention so far (heavy hitters) and the newest ones.

    Zhang et al. 2023, arXiv:2306.14048, section 4: every query, of the prompt and of decoding, adds its
    attention to the positions it looks at; half of the budget goes to the largest sums, half to the newest
    positions. Deviations: the query heads of one KV head are averaged (the paper's models have no grouped
    queries), and while decoding it evicts every ``every`` tokens instead of at each.
    """

    card: ClassVar[Card] = card(
        id="h2o",
        title="H2O",
        paper="arXiv:2306.14048",
        stage="kv",
        families=("llm", "vlm"),
        owns=("kv.length",),
        needs=("attention.scores",),
        spoils=("kv.rollback", "kv.uniform"),
        effects={"kept_prompt_tokens": "down", "prefill_kv_bytes": "down", "kv_bytes": "down", "cached_tokens": "down"},
        hopes={"decode_tokens_per_s": "up"},
        neutral={"keep": 1.0},
    )
    keep: float = knob(0.5, ge=0.01, le=1.0, help="size of the cache as a share of the prompt; 1 = never evict")
    recent: float = knob(0.5, ge=0.0, le=1.0, help="share of the budget for the newest positions; the rest goes to heavy hitters")
    every: int = knob(8, ge=1, le=256, help="evict every so many new tokens; more = less work, a slightly longer cache")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Sum attention at every call; evict at the end of the prefill and while decoding."""
        stack = ExitStack()
        if not self.is_neutral:
            stack.enter_context(session.hooked(session.observers, self.add))
            stack.enter_context(evicting(session, self.card.id, self.choose, self.every))
        return stack

    def add(self, call: AttentionCall) -> None:
        """Add what this call's queries paid to each entry."""
        group, sums = call.cache.group, column_sums(call)
        group.tracked[SUMS] = group.tracked[SUMS] + sums if SUMS in group.tracked else sums

    def choose(self, call: AttentionCall) -> Tensor | None:
        """Entries to keep [B, H, n] of one layer."""
        counts = budgets(call, self.keep)
        newest = [max(1, round(self.recent * n)) for n in counts]
        return keep_best(call, call.cache.group.tracked[SUMS], counts, recent=newest)

    def kv_factor(self) -> float:
        """The share kept."""
        return self.keep
