"""FINCH."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.asking import Question, asking
from workers.mechanisms.attention import AttentionCall, visible
from workers.mechanisms.cache import PADDING
from workers.mechanisms.eviction import Guarded, evicting
from workers.mechanisms.evictor import EVICTS, SHARED
from workers.mechanisms.shared_choice import SharedWindowChoice, best_in_all_heads
from workers.methods import card, knob
from workers.session import Session


class Finch(SharedWindowChoice):
    """Keep the cached positions that the question at the end of the prompt attends to most, chunk by chunk.

    Corallo and Papotti 2024, arXiv:2408.00167, prompt-guided layer-wise top-r position selection: behind every chunk of
    a long text the question is read, the positions that it attends to most stay, among them those of earlier chunks,
    and the question is taken back; so the cache grows by the share ``keep`` of each chunk. A query over more positions
    pays less to each, so its attention counts as many times as it sees positions (as in the authors' code); a position's
    score is the mean over the queries that could see it (all of them, unless a layer's attention has a sliding window).
    Attention is averaged over all query heads of a layer, and its heads keep the same positions.

    With ``between_chunks`` and a prompt that is read in chunks it works as in the paper; otherwise, as the prompt in one
    piece, once, at its end (a batch's rows then keep what they keep alone; chunks are cut at other places of each).
    Deviations: the question is the last ``window`` tokens (the paper and kvpress are told where it begins); the budget
    is a share of the prompt, question included; kept entries stay at their place in the text (the paper turns their keys
    to consecutive positions, to read past the trained context). kvpress scores every KV head for itself and, between
    chunks, asks only the question that has read everything.
    """

    card: ClassVar[Card] = card(id="finch", title="FINCH", paper="arXiv:2408.00167", **EVICTS)
    window: int = knob(32, ge=1, le=512, help="tokens of the question, the last of the prompt; they always stay")
    normalize: bool = knob(True, help="weigh each query by how many positions it sees; off = attention as it is")
    between_chunks: bool = knob(
        False,
        group=SHARED,
        help="where the prompt comes in chunks, ask the question behind each and evict: less memory at the peak, more work",
    )

    @contextmanager
    def _evicting(self, session: Session) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self.remembering(session))
            stack.enter_context(evicting(session, self.card.id, self.choose, self.when, self.every))
            if self.between_chunks and self.when != "decode":
                stack.enter_context(asking(session, self.card.id, self.window, self.scores, self.choose_asked))
            yield

    def choose_asked(self, call: AttentionCall, scores: Tensor, question: Question) -> Tensor | None:
        """The best so far, as large a share of what was read as will stay of the prompt."""
        share, begun = self.share(call), question.begun
        counts = [max(min(n, begun), round(share * n), 1) for n in question.read]
        return best_in_all_heads(call, scores, counts, Guarded(recent=begun))

    def scores(self, call: AttentionCall) -> Tensor:
        """Attention of the question's queries to each entry [B, S], mean over those that see it."""
        queries, held = call.newest_queries(self.window), call.held
        w, s = queries.shape[2], held.keys.shape[2]
        at = call.newest_positions(w)
        sees = visible(held, at, w, call.window, s, at.device)[:, 0] & (at != PADDING)[:, :, None]  # [B, w, S]
        paid = call.probabilities(queries).mean(1) * sees
        if self.normalize:
            paid = paid * sees.sum(2, keepdim=True)
        return paid.sum(1) / sees.sum(1).clamp_min(1)
