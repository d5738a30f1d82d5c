"""SpecPC."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

from studio_state.catalog import Card
from workers.families.batches import Batch
from workers.mechanisms.draft_scores import Draft, Drafts, most_noticed, notice, only, to_read
from workers.methods import card, knob
from workers.session import Session


class SpecPC(Drafts):
    """Let the model read only the prompt tokens that a draft attends to most.

    Galim et al. 2025, arXiv:2506.08373, section 4 (SpecPC): a draft reads the whole prompt; each token counts by the
    draft's largest attention to it, over heads, later layers and the last ``window`` queries, which weigh from 0 to 1.
    The maximum over neighbours is taken; the best come in with their neighbours until the budget is full, after the
    window itself. The model gets these tokens in order, with positions counted anew, as if they were the prompt.

    Deviations: budgets, and the layers that count, are shares; the window is never cut; window and kernel (64, and 32 or
    64 in the paper) suit prompts of a few hundred tokens. The released code leaves equal scores and equally near
    neighbours in no certain order; here the earlier token comes first. Without a draft model the model's own first layers
    draft. Tokens that a draft model does not know count as 0.
    """

    card: ClassVar[Card] = card(
        id="specpc",
        title="SpecPC",
        paper="arXiv:2506.08373",
        stage="tokens",
        families=("llm",),
        not_traits=("ssm",),
        owns=("tokens.prompt",),
        needs=("attention.scores",),
        effects={"kept_prompt_tokens": "down", "prefill_kv_bytes": "down"},
        hopes={"ttft_s": "down", "decode_tokens_per_s": "up"},
        neutral={"keep": 1.0},
    )
    keep: float = knob(0.5, ge=0.01, le=1.0, help="share of prompt tokens that the model reads; lower = faster, worse recall")
    window: int = knob(32, ge=1, le=512, help="last prompt tokens whose attention counts; they are always read")
    kernel: int = knob(
        16, ge=1, le=255, help="width of the neighbourhood that comes in with a token; wider keeps whole sentences"
    )
    start: float = knob(0.5, ge=0.0, le=1.0, help="share of the draft's layers whose attention does not count, from the first")
    look_ahead: int = knob(
        1, ge=1, le=256, help="tokens that the draft writes ahead; the attention of all but the newest counts too; more = slower"
    )

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Have the draft read every prompt first, and hand on a shorter one."""
        return nullcontext() if self.is_neutral else self._shortening(session)

    @contextmanager
    def _shortening(self, session: Session) -> Iterator[None]:
        with ExitStack() as stack:
            draft = self.draft(session, stack)
            stack.enter_context(session.hooked(session.prompt_filters, lambda batch: self._shorten(session, draft, batch)))
            yield

    def _shorten(self, session: Session, draft: Draft, batch: Batch) -> Batch:
        counts = to_read(batch.lengths, self.keep, self.window)
        if counts == batch.lengths:
            return batch
        scores, _ = notice(draft, batch, self.window, self.start, self.look_ahead)
        places = [most_noticed(s, n, self.window, self.kernel) for s, n in zip(scores, counts, strict=True)]
        session.did(self.card.id, sum(batch.lengths) - sum(counts))
        return only(session, batch, places)

    def kv_factor(self) -> float:
        """The share read."""
        return self.keep
