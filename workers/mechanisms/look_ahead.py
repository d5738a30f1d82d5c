"""Evicting by the queries of an answer that has not been given yet: a draft guesses it, the model reads the guess.

At the end of the prompt the model reads the look-ahead tokens, its queries there vote beside those of the prompt's last
tokens, and the entries of the look-ahead are taken back before anything is evicted. Keys and queries of the prompt do not
depend on what follows it, so that one more forward is the same as a prefill of prompt and look-ahead in one piece.
Galim et al. 2025, SpecKV, arXiv:2506.08373.

Shapes: B batch, Hq query heads, H KV heads, S stored entries, T look-ahead tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.cards import knob
from workers.families.batches import Batch, State
from workers.families.llm import LanguageFamily
from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.cache import StudioCache
from workers.mechanisms.draft_scores import Draft, Drafts, widened
from workers.mechanisms.eviction import evicting, most_attention
from workers.mechanisms.evictor import QueryEvictor
from workers.session import Session

TIE = 1e-9  # below the spacing of float32: orders equal votes only
Look = Callable[[StudioCache, Forward], Tensor]  # at the prompt's end -> look-ahead [B, T]; T may be 0


@dataclass(kw_only=True)
class Waiting(AttentionCall):
    """The last attention call of the prompt in one layer, until the look-ahead has voted.

    Attributes:
        votes: [B, H, S] of the prompt's last queries, later of the look-ahead too.
    """

    votes: Tensor


def best_votes(call: AttentionCall, query: Tensor) -> Tensor:
    """The largest attention of the newest queries [B, Hq, w, D] to each entry [B, H, S], over them and those of a KV head."""
    votes = call.probabilities(query)
    return votes.view(votes.shape[0], call.cache.heads, -1, votes.shape[-1]).amax(2)


class LookAheadEvictor(Drafts, QueryEvictor):
    """Keeps the positions with the best single vote; at the prompt's end the look-ahead votes too."""

    kernel: int = knob(7, ge=1, le=63, help="how far a vote counts for its neighbours; wider keeps whole phrases, 1 = not at all")
    look_ahead: int = knob(
        16,
        ge=0,
        le=1024,
        help="tokens that the draft writes ahead, whose queries vote too; more = further ahead, slower; 0 = none",
    )

    def scores(self, call: AttentionCall) -> Tensor:
        """Votes [B, H, S] (float64), widened over neighbours, which the window and padding are not; equal ones by their own."""
        votes = call.votes if isinstance(call, Waiting) else best_votes(call, call.newest_queries(self.window))
        votes, real = votes.clone(), call.held.real
        votes[..., votes.shape[-1] - self.guarded(call).newest(1)[0] :] = 0.0
        if real is not None:
            votes *= real
        return widened(votes, self.kernel).double() + TIE * votes.double()

    @contextmanager
    def foreseeing(self, session: Session, draft: Draft, look: Look) -> Iterator[None]:
        """Evict whenever it is time; at the prompt's end wait for all layers, then for the look-ahead.

        Args:
            draft: whose text it is; what follows the end of the text has no vote.
            look: called only if there is something to evict.
        """
        waiting: list[Waiting] = []

        def choose(call: AttentionCall) -> Tensor | list[Tensor] | None:
            if not (call.forward.phase == "prefill" and call.forward.ends_prefill):
                return self.choose(call)
            query = call.newest_queries(self.window).clone()
            votes = best_votes(call, query)
            waiting.append(
                Waiting(call.layer, query, call.cache, call.forward, call.scaling, call.window, call.softcap, votes=votes)
            )
            return None

        def finish(cache: StudioCache, forward: Forward) -> None:
            calls = [c for c in waiting if c.forward is forward]
            waiting.clear()
            if not any(c.votes.shape[-1] > max(self.counts(c, self.guarded(c))) for c in calls):
                return
            ids = look(cache, forward)
            ahead = vote_ahead(session, cache, forward, ids, draft.counted(ids))
            for call in calls:
                if call.layer in ahead:
                    call.votes = torch.maximum(call.votes, ahead[call.layer])
                before, kept = call.cache.stored, self.choose(call)
                if kept is not None:
                    call.cache.keep(kept)
                    session.did(self.card.id, before - call.cache.stored)
                else:  # the room that the look-ahead took goes too
                    for group in call.cache.groups:
                        group.store = group.store.heads(0, group.stop - group.start)

        with (
            session.remembering(self.window, on=self.when != "prefill"),
            evicting(session, self.card.id, choose, self.when, self.every, self.between_chunks),
            session.hooked(session.after_prefill, finish),
        ):
            yield


def vote_ahead(session: Session, cache: StudioCache, forward: Forward, ids: Tensor, counted: Tensor) -> dict[int, Tensor]:
    """The model reads the look-ahead and forgets it again: the best votes of its queries [B, H, S], per layer.

    Args:
        ids: [B, T].
        counted: [B, T] which of them have a vote.
    """
    state, family = state_after(cache, forward), LanguageFamily()
    if session.info.context:
        ids = ids[:, : max(0, session.info.context - int(state.next_position.max()))]
    count = ids.shape[1]
    found: dict[int, Tensor] = {}
    if not count:
        return found

    def vote(call: AttentionCall) -> None:
        found[call.layer] = most_attention(call, counted[:, :count])[..., :-count]

    with session.having(step_forward=None, observers=[vote], after_step=[], reading=None, retain_on=False, counts={}):
        family.step(session, state, ids)
    cache.crop_newest(count)
    return found


def state_after(cache: StudioCache, forward: Forward) -> State:
    """Where a generation would go on from the prompt's end.

    Raises:
        RuntimeError: the prompt has not passed the model yet.
    """
    if forward.logits is None:
        raise RuntimeError("the prompt has not passed the model yet; ask at its end")
    return State(cache, forward.positions[:, -1:] + 1, forward.logits[:, -1], list(forward.prompt_lengths), forward.padded)


@contextmanager
def drafting_beside(session: Session, draft: Draft, count: int, led: bool) -> Iterator[Look]:
    """Look-ahead of a draft with a cache of its own, which reads the prompt when it is needed, and is gone then.

    Args:
        led: it goes on from the token that the model says first, which is known by then.
    """
    given: list[Batch] = []

    def note(batch: Batch) -> Batch:
        given[:] = [batch]
        return batch

    def look(cache: StudioCache, forward: Forward) -> Tensor:
        return draft.write(given[0], count, state_after(cache, forward).logits.argmax(-1) if led else None)

    with session.hooked(session.prompt_filters, note):
        yield look


def from_first_layers(draft: Draft, count: int, cache: StudioCache, forward: Forward) -> Tensor:
    """Look-ahead [B, <= count] of the model's own first layers on the model's own cache, which stays as it is.

    They go on from the token that the whole model says first, which is known by now.
    """
    own, state = StudioCache(0), state_after(cache, forward)
    own.layers, state.cache = cache.layers[: draft.beside.info.layers], own
    with draft.running():
        ids = draft.go_on(state, count, state.logits.argmax(-1))
    own.crop_newest(ids.shape[1] - 1)
    return ids
