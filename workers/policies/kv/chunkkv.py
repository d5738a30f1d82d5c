"""ChunkKV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import ClassVar, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.eviction import evicting
from workers.mechanisms.evictor import EVICTS
from workers.mechanisms.shared_choice import SharedWindowChoice
from workers.methods import card, knob
from workers.session import Session


class Ranked(NamedTuple):
    """The scores [B, S] of entries at places [B or 1, 1, S], and the forward that they are from, not kept alive."""

    forward: ref[Forward]
    places: Tensor
    scores: Tensor


class ChunkKV(SharedWindowChoice):
    """Keep or drop whole stretches of text instead of single positions.

    Liu et al. 2025, arXiv:2502.00299, section 3: the prompt is cut into chunks of ``chunk_length`` positions, each is
    scored by the attention that the last ``window`` queries pay to it, and the best chunks stay with the window itself.
    Layers in groups of ``reuse_layers`` take over the choice of the first of them (the paper's index reuse, which saves
    the scoring). As in the released code, votes are averaged over all query heads of a layer and its heads share the
    choice. Deviations: a chunk's score is the mean over those of its entries that are there and not in the window
    (the same order as by sums, but for chunks that are not whole); the last chunk that fits is cut, its first positions
    stay, so that the budget, a share of the prompt, window included, is met exactly.
    """

    card: ClassVar[Card] = card(id="chunkkv", title="ChunkKV", paper="arXiv:2502.00299", **EVICTS)
    chunk_length: int = knob(10, ge=1, le=512, help="positions of a chunk; longer keeps whole sentences, 1 = single positions")
    reuse_layers: int = knob(1, ge=1, le=64, help="so many layers in a row share the choice of the first; 1 = each chooses")

    @contextmanager
    def _evicting(self, session: Session) -> Iterator[None]:
        choose = partial(self.choose_like, [])
        with self.remembering(session), evicting(session, self.card.id, choose, self.when, self.every, self.between_chunks):
            yield

    def choose_like(self, latest: list[Ranked], call: AttentionCall) -> Tensor | None:
        """The best chunks, by the scores of the group's first layer where it held the same entries in this forward."""
        places = call.held.places()[:, :1]
        layers = [layer for layer, memory in enumerate(call.forward.cache.layers) if memory.keeps_kv]
        first = layers.index(call.layer) % self.reuse_layers == 0
        if first or not latest or latest[0].forward() is not call.forward or not torch.equal(latest[0].places, places):
            latest[:] = [Ranked(ref(call.forward), places, self.scores(call))]
        return self.best(call, latest[0].scores)

    def scores(self, call: AttentionCall) -> Tensor:
        """Rank of each entry [B, S]: by its chunk, within it by its place."""
        queries, held = call.newest_queries(self.window), call.held
        votes = call.probabilities(queries).mean(1).sum(1)  # [B, S]
        places = held.places()[:, 0].expand_as(votes)
        counted = torch.ones_like(votes) if held.real is None else held.real[:, 0].to(votes.dtype).expand_as(votes).clone()
        counted[:, -queries.shape[2] :] = 0.0
        chunk = places.clamp_min(0) // self.chunk_length
        zero = votes.new_zeros(len(votes), int(chunk.max()) + 1)
        size = zero.scatter_add(1, chunk, counted)
        mean = (zero.scatter_add(1, chunk, votes * counted) / size).masked_fill(size == 0, -1.0)  # votes are never below 0
        rank = mean.argsort(dim=-1, stable=True).argsort(dim=-1)
        return (rank.gather(1, chunk) * self.chunk_length - places % self.chunk_length).double()
