"""SpecKV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import ClassVar, Literal

import torch

from studio_state.catalog import Card
from workers.mechanisms.draft_scores import Draft
from workers.mechanisms.evictor import EVICTS
from workers.mechanisms.look_ahead import Look, LookAheadEvictor, drafting_beside, from_first_layers
from workers.methods import card, knob
from workers.session import Session


class SpecKV(LookAheadEvictor):
    """Keep the cached prompt positions that the prompt's last tokens and a draft of the answer attend to most.

    Galim et al. 2025, arXiv:2506.08373, section 4 (SpecKV): a draft writes ahead greedily, the model reads what it wrote,
    and each position counts by its largest attention weight over these queries, those of the last ``window`` prompt
    tokens and the query heads of a KV head; the maximum over neighbours is taken, and the best stay with the window. What
    was read ahead leaves the cache again, so that the answer goes on from the prompt's last token.

    Deviations: the budget is a share of the prompt, and ``window`` counts its last token, which the released code counts
    apart; the first new token comes from the whole cache, as with the other policies that evict (the released code
    reads the last token again, on the cut cache). This token is known before the draft begins, so the look-ahead starts
    with it, unless ``first`` = draft, as in the paper: for drafts that are often wrong the difference is large. Without a
    draft model the model's own first layers draft, after its own first token on its own cache. A look-ahead ends with the
    text (at an end token). Evictions before the prompt's end and while answering (``between_chunks``, ``when``) see no
    look-ahead. The sparse prefill of the paper for prompts over 4,096 tokens is not built: prompts are read in full.
    """

    card: ClassVar[Card] = card(
        id="speckv", title="SpecKV", paper="arXiv:2506.08373", not_traits=("ssm",), **{**EVICTS, "families": ("llm",)}
    )

    first: Literal["model", "draft"] = knob(
        "model",
        help="who says the first look-ahead token: model = the model, at no cost and always right; draft = the draft, as in the paper",
    )

    @contextmanager
    def _evicting(self, session: Session) -> Iterator[None]:
        with ExitStack() as stack:
            draft = self.draft(session, stack)
            stack.enter_context(self.foreseeing(session, draft, self._looking(session, draft, stack)))
            yield

    def _looking(self, session: Session, draft: Draft, stack: ExitStack) -> Look:
        if not self.look_ahead:
            return lambda cache, forward: torch.zeros(len(forward.positions), 0, dtype=torch.long, device=session.device)
        if self.first == "model" and not self.draft_model:
            return partial(from_first_layers, draft, self.look_ahead)
        return stack.enter_context(drafting_beside(session, draft, self.look_ahead, self.first == "model"))
