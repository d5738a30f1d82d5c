"""A draft that reads the prompt, and what its attention says about it.

The draft is a smaller model, or the model's own first layers with its final norm and head. It answers to no hook of the
lane: it keeps its own cache, and nobody evicts from it. Galim et al. 2025, Draft-based approximate inference,
arXiv:2506.08373.

Shapes: B batch, L padded prompt length, n tokens of one prompt, T look-ahead tokens, Hq query heads, S stored entries,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio_state.errors import WorkloadError
from workers.cards import knob
from workers.families.batches import Batch, State, make_batch
from workers.families.llm import LanguageFamily, end_tokens
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.drafting import DraftModel, layer_list, load_draft
from workers.methods import Policy
from workers.session import Session


@dataclass(frozen=True)
class Draft:
    """A draft, ready to run beside a model.

    Attributes:
        session: the lane that it drafts for.
        beside: the draft's own session, with no hooks.
        layers: what stands in the place of the model's layers while it drafts, by name; empty = it is another model.
        family: of the draft.
        known: ids that it can read; None = all.
    """

    session: Session
    beside: Session
    family: LanguageFamily
    layers: dict[str, nn.ModuleList]
    known: frozenset[int] | None = None

    def running(self) -> AbstractContextManager[None]:
        """The model without its later layers, where it drafts for itself."""
        return self.session.swapped(dict(self.layers)) if self.layers else nullcontext()

    def readable(self, batch: Batch) -> list[list[int]]:
        """Places of the tokens that the draft can read, per prompt.

        Raises:
            WorkloadError: there are none, or more than the draft's context.
        """
        places = [[i for i, t in enumerate(ids) if self.known is None or t in self.known] for ids in rows_of(batch)]
        name, context = self.beside.info.name, self.beside.info.context
        if not all(places):
            raise WorkloadError(f"the draft {name} knows no token of a prompt; give a draft_model for this text, or none")
        longest = max(map(len, places))
        if context and longest > context:
            raise WorkloadError(
                f"a prompt has {longest} tokens, but the draft {name} reads at most {context}; "
                "shorten the prompt or give another draft_model"
            )
        return places

    def write(self, batch: Batch, count: int, first: Tensor | None = None) -> Tensor:
        """Read the prompts into a cache of the draft's own, and go on: look-ahead [B, <= count].

        Args:
            first: [B] the first token, where it is known already; the draft says its own where it does not know that one.
        """
        texts = [[ids[i] for i in here] for ids, here in zip(rows_of(batch), self.readable(batch), strict=True)]
        with self.running():
            state = self.family.prefill(self.beside, make_batch(texts, 0, batch.ids.device))
            if first is not None and self.known is not None:
                known = torch.tensor([t in self.known for t in first.tolist()], device=first.device)
                first = torch.where(known, first, state.logits[:, : self.width].argmax(-1))
            if count:
                return self.go_on(state, count, first)
        return torch.zeros(len(texts), 0, dtype=torch.long, device=batch.ids.device)

    @property
    def width(self) -> int:
        """Tokens that the model can read: vocabularies of one tokenizer may be padded to different widths."""
        model: Any = self.session.model
        rows: int = model.get_input_embeddings().num_embeddings
        return rows

    def go_on(self, state: State, count: int, first: Tensor | None = None) -> Tensor:
        """The likeliest tokens that follow [B, 1 to count]: fewer where the context ends, or where every text has ended.

        The newest of them is not read. Call it inside of :meth:`running`.

        Args:
            first: [B] the first of them, where it is known already.
        """
        end, context = self.end_tokens(), self.beside.info.context
        if context:
            count = min(count, context - int(state.next_position.max()) + 1)
        found = [state.logits[:, : self.width].argmax(-1) if first is None else first]
        while len(found) < count and not bool(torch.isin(torch.stack(found, 1), end).any(1).all()):
            logits = self.family.step(self.beside, state, found[-1][:, None])
            found.append(logits[:, -1, : self.width].argmax(-1))
        return torch.stack(found, 1)

    def end_tokens(self) -> Tensor:
        """Ids that end a text; none where the experiment goes on after them."""
        ids = [] if self.session.spec.eos == "ignore" else sorted(end_tokens(self.session))
        return torch.tensor(ids, dtype=torch.long, device=self.session.device)

    def counted(self, ids: Tensor) -> Tensor:
        """Which look-ahead tokens belong to the text: bool [B, T], the end token included, what follows it not."""
        ends = torch.isin(ids, self.end_tokens()).int()
        return ends.cumsum(1) - ends == 0


class Drafts(Policy):
    """Which draft helps."""

    draft_model: str = knob(
        "",
        max_length=4096,
        format="path",
        help="a smaller model with the same vocabulary that drafts: zoo id, Hub id or folder; empty = the model's own first layers",
    )
    depth: float = knob(
        0.5,
        ge=0.02,
        le=1.0,
        help="share of the layers, from the first, that draft where there is no draft model; more = better drafts, slower",
    )

    def prepare(self, session: Session) -> None:
        """Load the draft model."""
        if self.companion():
            self._loaded(session)

    def companion(self) -> str:
        """The draft model."""
        return "" if self.is_neutral else self.draft_model

    def _loaded(self, session: Session) -> DraftModel:
        """The draft model, loaded once per experiment, for all lanes that name it."""
        small: DraftModel = session.once((DraftModel, self.draft_model), lambda: load_draft(session, self.draft_model))
        return small

    def draft(self, session: Session, stack: ExitStack) -> Draft:
        """The draft of this lane. Its weights count as the lane's while ``stack`` is open.

        Raises:
            SpecError: the draft model cannot draft for this model.
            Unavailable: there is none, and the model does not keep its layers in one list.
        """
        family = LanguageFamily()
        shared: dict[str, Any] = {"spec": session.spec, "processor": session.processor, "device": session.device}
        shared |= {"dtype": session.dtype, "is_cancelled": session.is_cancelled, "family": family}
        if self.draft_model:
            small = self._loaded(session)
            stack.enter_context(session.hooked(session.companions, small.model))
            return Draft(session, Session(info=small.info, model=small.model, **shared), family, {}, small.known)
        name, layers = layer_list(session)
        first = layers[: max(1, round(self.depth * len(layers)))]
        info = session.info.model_copy(update={"layers": len(first)})
        return Draft(session, Session(info=info, model=session.model, **shared), family, {name: first})


class Noticing:
    """How much the draft's best query and head, over layers, looked at each prompt token: an observer of its forwards.

    Section 4.3 of the paper (SpecPC): the newest ``window`` queries of the prompt with weights that rise from 0 to 1, and
    the queries of look-ahead tokens with weight 1; the maximum over heads, queries and layers.

    Attributes:
        scores: [B, L] float32; None before anything was read.
    """

    def __init__(self, lengths: Sequence[int], window: int, first_layer: int):
        self.lengths, self.window, self.first_layer = lengths, window, first_layer
        self.scores: Tensor | None = None

    def __call__(self, call: AttentionCall) -> None:
        """Take in the attention of one layer."""
        forward = call.forward
        if call.layer < self.first_layer or (forward.phase == "prefill" and not forward.ends_prefill):
            return
        query = call.newest_queries(self.window) if forward.phase == "prefill" else call.query
        seen = call.probabilities(query)[..., : max(self.lengths)]  # [B, Hq, w, L]
        if forward.phase == "prefill":
            seen = seen * rising(self.lengths, query.shape[2], query.device)[:, None, :, None]
        best = seen.amax((1, 2))
        self.scores = best if self.scores is None else torch.maximum(self.scores, best)


def rising(lengths: Sequence[int], window: int, device: torch.device) -> Tensor:
    """Weights [B, window] of the newest queries: evenly from 0 to 1 over those that a prompt has, 0 for its padding."""
    rows = torch.zeros(len(lengths), window, device=device)
    for row, n in enumerate(lengths):
        own = min(n, window)
        rows[row, window - own :] = torch.linspace(0, 1, own, device=device) if own > 1 else 1.0
    return rows


def rows_of(batch: Batch) -> list[list[int]]:
    """The prompts of a batch, without padding."""
    return [ids[len(ids) - n :] for ids, n in zip(batch.ids.tolist(), batch.lengths, strict=True)]


def notice(draft: Draft, batch: Batch, window: int, start: float, count: int) -> tuple[list[Tensor], Tensor]:
    """Let the draft read prompts and go on a little.

    Args:
        window: newest prompt tokens whose queries count.
        start: share of the draft's layers that do not count.
        count: look-ahead tokens; all but the newest, which is not read, count too.

    Returns:
        Per row how much each prompt token was looked at [n], 0 where the draft cannot read it; the look-ahead [B, <= count].
    """
    places, layers = draft.readable(batch), draft.beside.info.layers
    seen = Noticing([len(here) for here in places], window, min(int(start * layers), layers - 1))
    with draft.beside.having(observers=[seen], retain_queries=window):
        ahead = draft.write(batch, count)
    scores = []
    for row, (n, here) in enumerate(zip(batch.lengths, places, strict=True)):
        found = torch.zeros(n, device=batch.ids.device)
        if seen.scores is not None:  # None: a depth policy leaves all of these layers out
            found[torch.tensor(here, device=found.device)] = seen.scores[row, -len(here) :]
        scores.append(found)
    return scores, ahead


def widened(scores: Tensor, kernel: int) -> Tensor:
    """Largest score among each entry and its neighbours [..., S]: ``kernel`` wide, one more after it than before if even.

    Args:
        scores: not below 0; nothing stands beyond their ends.
    """
    before = (kernel - 1) // 2
    flat = F.pad(scores.reshape(1, -1, scores.shape[-1]), (before, kernel - 1 - before))
    return F.max_pool1d(flat, kernel, 1).view(scores.shape)


def most_noticed(scores: Tensor, count: int, window: int, kernel: int) -> Tensor:
    """Places of the tokens to read, ascending: the last ``window``, then the best with their neighbours, ``count`` in all.

    The best by widened score come in order, each followed by its neighbours from near to far (the earlier one first).

    Args:
        scores: [n] of one prompt, not below 0.
        count: at least ``window``.
        kernel: width of the widening and of the neighbourhood.
    """
    n = scores.shape[0]
    if count >= n:
        return torch.arange(n, device=scores.device)
    best = widened(scores, kernel).argsort(descending=True, stable=True)[:count]
    near = torch.arange(kernel, device=scores.device) - (kernel - 1) // 2
    near = near[near.abs().argsort(stable=True)]
    wanted = (best[:, None] + near).clamp(0, n - 1).flatten()
    wanted = torch.cat((torch.arange(n - window, n, device=scores.device), wanted))
    turn = torch.full((n,), len(wanted), device=scores.device)  # at which each place is wanted first
    turn.scatter_reduce_(0, wanted, torch.arange(len(wanted), device=scores.device), "amin")
    return turn.argsort(stable=True)[:count].sort().values


def only(session: Session, batch: Batch, places: Sequence[Tensor]) -> Batch:
    """The batch with these tokens of each row alone, counted anew from position 0."""
    chosen = [p.tolist() for p in places]
    prompts = [[ids[i] for i in here] for ids, here in zip(rows_of(batch), chosen, strict=True)]
    short = make_batch(prompts, session.processor.pad_token_id or 0, batch.ids.device)
    short.images = batch.images
    origin = batch.origin or [list(range(n)) for n in batch.lengths]
    short.origin = [[place[i] for i in here] for place, here in zip(origin, chosen, strict=True)]
    return short


def to_read(lengths: Sequence[int], keep: float, window: int) -> list[int]:
    """Tokens left of each prompt: the share ``keep``, never fewer than its window."""
    return [min(n, max(round(keep * n), window, 1)) for n in lengths]
