"""Pages of cached entries, and which of them a query could look at most.

A page is a run of entries of one head, counted from its first real one, so that a row of a padded batch has the pages
that it would have alone. Of each page the smallest and the largest number of every key channel are kept.

Shapes: B batch, H KV heads, Hq query heads, S stored entries, T new tokens, P pages of the longest head, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.mechanisms.held import Held
from workers.mechanisms.kv_store import storage_bytes


@dataclass(frozen=True)
class Pages:
    """Bounds of the keys of each page.

    Attributes:
        low, high: [B, H, P, D]; a head with fewer pages ends with bounds of nothing, inf and -inf.
        entries: [B, H] real entries; they stand last among those stored.
        size: entries of a page; the newest page may have fewer.
    """

    low: Tensor
    high: Tensor
    entries: Tensor
    size: int

    @classmethod
    def of(cls, held: Held, size: int) -> Pages:
        """The pages of everything that is held."""
        b, h, s, d = held.keys.shape
        real = torch.ones_like(held.keys[..., 0], dtype=torch.bool) if held.real is None else held.real.expand(b, h, s)
        nothing = held.keys.new_full((b, h, 0, d), torch.inf)
        return cls(nothing, -nothing, torch.zeros_like(real[..., 0], dtype=torch.long), size).joined(held.keys, real)

    def joined(self, keys: Tensor, real: Tensor | None = None) -> Pages:
        """With the entries of keys [B, H, T, D] behind them.

        Args:
            real: [B, H, T], False for padding, which comes first; None = all are real.
        """
        if real is None:
            real = torch.ones_like(keys[..., 0], dtype=torch.bool)
        entries = self.entries + real.sum(2)
        more = max(0, -(-int(entries.max()) // self.size) - self.low.shape[2])
        page = ((self.entries.unsqueeze(-1) + real.cumsum(2) - 1).clamp_min(0) // self.size).unsqueeze(-1).expand_as(keys)
        bounds = []
        for bound, nothing, extreme in ((self.low, torch.inf, "amin"), (self.high, -torch.inf, "amax")):
            room = F.pad(bound, (0, 0, 0, more), value=nothing)
            bounds.append(room.scatter_reduce(2, page, keys.masked_fill(~real.unsqueeze(-1), nothing), extreme))
        return Pages(bounds[0], bounds[1], entries, self.size)

    def heads(self, start: int, stop: int) -> Pages:
        """Those of some heads, in memory of their own."""
        low, high, entries = (x[:, start:stop].clone() for x in (self.low, self.high, self.entries))
        return Pages(low, high, entries, self.size)

    def nbytes(self) -> int:
        """Bytes of the bounds; like the index of kept positions, the numbers of entries are not counted."""
        return storage_bytes(self.low) + storage_bytes(self.high)

    # -- choosing --------------------------------------------------------------------------
    @property
    def used(self) -> Tensor:
        """Pages of each head [B, H]."""
        return (self.entries + self.size - 1) // self.size

    def bounds(self, query: Tensor) -> Tensor:
        """The most that any of a KV head's queries could agree with a key of each page [B, H, P]; -inf where there is none.

        Tang et al. 2024, Quest, arXiv:2406.10774, section 3.3: sum over channels of max(q low, q high).

        Args:
            query: [B, Hq, T, D]; the largest of the T queries and of the query heads of a KV head counts.
        """
        b, h, p, d = self.low.shape
        nothing = (torch.arange(p, device=query.device) >= self.used.unsqueeze(-1)).unsqueeze(-1)
        low, high = self.low.masked_fill(nothing, 0), self.high.masked_fill(nothing, 0)
        queries = query.reshape(b, h, -1, d)
        most = queries.clamp_min(0) @ high.transpose(2, 3) + queries.clamp_max(0) @ low.transpose(2, 3)
        return most.amax(2).masked_fill(nothing.squeeze(-1), -torch.inf)

    def best(self, query: Tensor, keep: float, reach: Tensor | None = None) -> Tensor | None:
        """The pages to read: bool [B, H, P]; None = all of them.

        Always the pages of the query's own T entries; in all so many as the share ``keep`` says, and if these entries
        stand in several pages, the others on top.

        Args:
            query: [B, Hq, T, D], of the newest entries.
            reach: [B, H], the first entry that any of them may look at; None = the first of all.
        """
        number = torch.arange(self.low.shape[2], device=query.device)
        first = torch.zeros_like(self.entries) if reach is None else reach // self.size
        own = (self.entries - query.shape[2]).clamp_min(0) // self.size
        within = (number >= first.unsqueeze(-1)) & (number < self.used.unsqueeze(-1))
        new = within & (number >= own.unsqueeze(-1))
        count = (keep * within.sum(2).double()).round().long().clamp_min(1) + new.sum(2) - 1
        if bool((count >= within.sum(2)).all()):
            return None
        scores = self.bounds(query).masked_fill(~within, -torch.inf).masked_fill(new, torch.inf)
        rank = scores.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        return within & (rank < count.unsqueeze(-1))

    def index(self, chosen: Tensor, stored: int) -> Tensor:
        """The entries of the chosen pages, ascending: [B, H, n], filled up in front with -1.

        Args:
            chosen: bool [B, H, P].
            stored: S, the entries of the rectangle that the index counts in.
        """
        page = chosen.int().argsort(dim=2, descending=True, stable=True)[:, :, : int(chosen.sum(2).max())]
        entry = page.unsqueeze(-1) * self.size + torch.arange(self.size, device=page.device)  # [B, H, p, size]
        there = chosen.gather(2, page).unsqueeze(-1) & (entry < self.entries[..., None, None])
        place = torch.where(there, entry + stored - self.entries[..., None, None], -1).flatten(2)
        return place.sort(-1).values[:, :, place.shape[2] - int(there.sum((2, 3)).max()) :]


def together(pages: Sequence[Pages]) -> Pages:
    """The pages of several groups of heads, one behind the other."""
    if len(pages) == 1:
        return pages[0]
    longest = max(p.low.shape[2] for p in pages)
    low, high = (
        torch.cat([F.pad(getattr(p, name), (0, 0, 0, longest - p.low.shape[2]), value=fill) for p in pages], 1)
        for name, fill in (("low", torch.inf), ("high", -torch.inf))
    )
    return Pages(low, high, torch.cat([p.entries for p in pages], 1), pages[0].size)
