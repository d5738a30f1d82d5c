"""SnapKV."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import budgets, evicting, keep_best, per_kv_head, real_entries
from workers.mechanisms.ranking import smooth
from workers.methods import Policy, card, knob
from workers.session import Session


class SnapKV(Policy):
    """Keep the cached prompt positions that the last prompt tokens attend to most.

    Li et al. 2024, arXiv:2404.14469, section 3: the attention of the last ``window`` queries is
    summed per position, smoothed by pooling, and the best positions stay with the window itself.
    Deviations: votes of the query heads of one KV head are averaged (the paper's models have no
    grouped queries), and the budget is a share of the prompt, window included.
    """

    card: ClassVar[Card] = card(
        id="snapkv",
        title="SnapKV",
        paper="arXiv:2404.14469",
        stage="kv",
        families=("llm", "vlm"),
        owns=("kv.length",),
        needs=("attention.scores",),
        spoils=("kv.rollback", "kv.uniform"),
        effects={"kept_prompt_tokens": "down", "prefill_kv_bytes": "down"},
        hopes={"decode_tokens_per_s": "up"},
        neutral={"keep": 1.0},
    )
    keep: float = knob(0.5, ge=0.01, le=1.0, help="share of prompt positions kept; lower = smaller and faster, worse recall")
    window: int = knob(32, ge=1, le=512, help="last prompt tokens whose attention votes; they always stay")
    kernel: int = knob(5, ge=1, le=63, help="width of the smoothing; wider keeps whole phrases, 1 = none")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Vote and evict in every layer at the end of the prefill."""
        stack = ExitStack()
        stack.enter_context(session.having(retain_queries=max(session.retain_queries, self.window)))
        stack.enter_context(evicting(session, self.card.id, self.choose))
        return stack

    def choose(self, call: AttentionCall) -> Tensor | None:
        """Entries to keep [B, H, n] of one layer."""
        query = call.newest_queries(self.window)
        heads = call.cache.group.stop
        votes = per_kv_head(call.probabilities(query).sum(2), heads)  # [B, H, S]
        votes = smooth(votes, self.kernel, real_entries(call.cache.group))
        return keep_best(call, votes, budgets(call, self.keep, query.shape[2]), recent=query.shape[2])

    def kv_factor(self) -> float:
        """The share kept."""
        return self.keep
