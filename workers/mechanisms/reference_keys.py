"""Attention in which older keys are followed by a reference that takes over only what changed enough.

Of one KV head, let k_t be the keys in order. The reference starts as k_0; with every key it takes over those numbers that
differ from it by at least a threshold. A query compares itself with the newest keys as they are and with the reference
for the older ones, so that ``q . reference_t = q . reference_(t-1) + q . delta_t``: only the numbers of delta_t that are
not zero cost a multiply-add. Here the sums are taken in dense form and those multiply-adds are counted.

Keys are replaced in the cache by their reference once no query to come sees them as they are, so it grows by nothing.

Shapes: B batch, Hq query heads, H KV heads, T new tokens, S stored entries, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from studio_state.errors import SpecError
from workers.mechanisms.attention import AttentionCall, capped, visible
from workers.mechanisms.cache import PADDING, HeadGroup
from workers.mechanisms.held import Held
from workers.mechanisms.kv_store import FloatStore

AGED = "aged"  # in HeadGroup.tracked: which keys are references by now
CHANGED = "changed"  # in HeadGroup.tracked: how many numbers of an aged key changed
ROWS = 256  # queries whose logits are held at once


@dataclass
class ReferenceAttention:
    """The attention of all layers of a text: to be ``session.attending``.

    Attributes:
        alpha: threshold, in units of the root mean square of a head's keys over the prompt.
        window: newest keys that a query sees as they are, its own among them.
        sinks: first keys that every query sees as they are.
        thresholds: per layer [B, H].
        needed, taken: multiply-adds of queries with keys: of full attention, and those that are left.
    """

    alpha: float
    window: int
    sinks: int
    thresholds: dict[int, Tensor] = field(default_factory=dict)
    needed: float | Tensor = 0.0
    taken: float | Tensor = 0.0

    def __call__(self, call: AttentionCall) -> Tensor | None:
        """What comes out of the attention of one layer [B, Hq, T, D]; None where the keys as stored are right for all queries."""
        groups = call.cache.groups
        if call.forward.phase == "prefill":
            self.thresholds[call.layer] = self.alpha * root_mean_square(call.cache.held())
        single = call.query.shape[2] == 1
        parts = [self._part(call, g, single) for g in groups]
        outs = None if single or not any(part.changes for part in parts) else [part.attend() for part in parts]
        for part in parts:
            needed, taken = part.work()
            self.needed, self.taken = self.needed + needed, self.taken + taken
            part.store()
        return None if outs is None else torch.cat(outs, 1)

    def _part(self, call: AttentionCall, group: HeadGroup, single: bool) -> Part:
        held, positions = group.held(), call.forward.positions_at(call.layer)
        places = held.places().expand(*held.keys.shape[:3])
        aged = group.tracked.get(AGED, torch.zeros_like(places, dtype=torch.bool))
        # one query sees its window as stored, and what leaves it waits for the next one
        last = positions[:, -1, None, None] - (1 if single else 0)
        due = ~aged & (places != PADDING) & (places <= last + 1 - self.window)
        whole = ~due | (places < self.sinks)
        whole[:, :, 0] = True
        whole[:, :, 1:] |= places[:, :, :-1] == PADDING
        threshold = self.thresholds[call.layer][:, group.start : group.stop]
        columns = due.any(0).any(0).nonzero()[:, 0].tolist()
        start, stop = (columns[0], columns[-1] + 1) if columns else (0, 0)
        references, numbers = follow(held.keys, whole, threshold, start, stop)
        changed = group.tracked.get(CHANGED, torch.zeros(due.shape, device=due.device)).clone()
        changed[:, :, start:stop] = torch.where(due[:, :, start:stop], numbers, changed[:, :, start:stop])
        return Part(call, group, held, positions, places, aged | due, references, start, changed, self.window)


def follow(keys: Tensor, whole: Tensor, threshold: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The references of the entries from ``start`` to ``stop`` [B, H, n, D], and how many numbers changed in each [B, H, n].

    Args:
        keys: [B, H, S, D] in the order of the text; the one before ``start`` is the reference to begin with.
        whole: [B, H, S] keys that are taken over as they are.
        threshold: [B, H].
    """
    reference, found, numbers = keys[:, :, max(0, start - 1)], [keys[:, :, :0]], [whole[:, :, :0].float()]
    for column in range(start, stop):
        key = keys[:, :, column]
        change = ((key - reference).abs() >= threshold[..., None]) | whole[:, :, column, None]
        reference = torch.where(change, key, reference)
        found.append(reference[:, :, None])
        numbers.append(change.sum(-1, keepdim=True).float())
    return torch.cat(found, 2), torch.cat(numbers, 2)


def root_mean_square(held: Held) -> Tensor:
    """Of the keys of each head, padding left out: [B, H] float32."""
    squares = held.keys.float().square().mean(-1)  # [B, H, S]
    if held.real is None:
        return squares.mean(-1).sqrt()
    real = held.real.expand_as(squares)
    return ((squares * real).sum(-1) / real.sum(-1)).sqrt()


@dataclass
class Part:
    """One attention call for the heads of one group.

    Attributes:
        aged: [B, H, S] entries that are references behind this call.
        references: [B, H, n, D] what stands in the place of the keys from ``start`` on.
        changed: [B, H, S] numbers of each aged key that changed.
    """

    call: AttentionCall
    group: HeadGroup
    held: Held
    positions: Tensor
    places: Tensor
    aged: Tensor
    references: Tensor
    start: int
    changed: Tensor
    window: int

    @property
    def changes(self) -> bool:
        """Some queries see other keys than those stored, or some keys are to become references."""
        return self.references.shape[2] > 0

    def attend(self) -> Tensor:
        """Softmax attention to keys as they are inside the window, to references outside: [B, heads, T, D]."""
        call, per_kv = self.call, self.call.query.shape[1] // self.call.cache.heads
        query = call.query[:, self.group.start * per_kv : self.group.stop * per_kv]
        b, hq, t, d = query.shape
        h, behind = self.places.shape[1], self.start + self.references.shape[2]
        older_keys = torch.cat((self.held.keys[:, :, : self.start], self.references, self.held.keys[:, :, behind:]), 2)
        keys, references, values = (x.float() for x in (self.held.keys, older_keys, self.held.values))
        outs = []
        for start in range(0, t, ROWS):
            some = query[:, :, start : start + ROWS].float()
            sees, near = self._sight(start, some.shape[2])
            packed = some.reshape(b, h, -1, d)
            exact, older = (packed @ x.transpose(2, 3) * call.scaling for x in (keys, references))
            logits = capped(torch.where(near.repeat(1, 1, per_kv, 1), exact, older), call.softcap)
            logits = logits.masked_fill(~sees.repeat(1, 1, per_kv, 1), float("-inf"))
            outs.append((logits.softmax(-1) @ values).view(b, hq, some.shape[2], -1))
        return torch.cat(outs, 2).to(query.dtype)

    def work(self) -> tuple[Tensor, Tensor]:
        """Multiply-adds of queries with keys of all heads of a KV head: (in full, left); padding has none."""
        d, t = self.held.keys.shape[-1], self.positions.shape[1]
        near, far = torch.zeros_like(self.changed), torch.zeros_like(self.changed)
        for start in range(0, t, ROWS):
            sees, close = self._sight(start, min(ROWS, t - start))
            sees = sees & (self.positions[:, start : start + ROWS] != PADDING)[:, None, :, None]
            near, far = near + (sees & close).sum(2), far + (sees & ~close).sum(2)
        near, far = near.double(), far.double()
        return (near + far).sum() * d, near.sum() * d + (far * self.changed).sum()

    def store(self) -> None:
        """Put the references into the cache.

        Raises:
            SpecError: keys are stored in a format that cannot be written.
        """
        self.group.tracked |= {AGED: self.aged, CHANGED: self.changed}
        if not self.changes:
            return
        if not isinstance(self.group.store, FloatStore):
            raise SpecError(
                f"cached keys are stored as {type(self.group.store).__name__} and cannot become references any more; "
                "remove the policy that packs the cache, or DeltaLLM"
            )
        self.held.keys[:, :, self.start : self.start + self.references.shape[2]] = self.references  # the store's own memory

    def _sight(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Which entries ``count`` queries from ``start`` on see, and which of them as they are: [B, H, count, S]."""
        s, t = self.places.shape[2], self.positions.shape[1]
        positions = self.positions[:, start : start + count]
        sees = visible(self.held, positions, count, self.call.window, s, positions.device, t - start - count)
        near = positions[:, None, :, None] - self.places[:, :, None] < self.window
        return sees.expand_as(near), near
