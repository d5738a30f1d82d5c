"""Reading only some of the cached entries in a decode step; the cache keeps them all.

Shapes: B batch, H KV heads, n entries read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.cache import PADDING, KVLayer, StudioCache
from workers.mechanisms.held import Held
from workers.session import Session


@dataclass
class Amount:
    """Entries of all rows, heads and layers: what was held, and what of it was left unread."""

    held: float | Tensor = 0.0
    unread: float | Tensor = 0.0


@contextmanager
def reading_part(session: Session, policy: str, choose: Callable[[AttentionCall], Tensor | None]) -> Iterator[None]:
    """Let every attention of a decode step read what ``choose`` names, and tell the share that is left unread.

    Args:
        choose: attention call -> places among what the layer holds [B, H, n], ascending, below 0 = no entry, the
            newest entries last; None = everything.
    """
    step, total = Amount(), Amount()
    of: Forward | None = None  # what ``step`` belongs to; drafts of a model by itself come here too, but never to account

    def read(call: AttentionCall) -> Held | None:
        nonlocal of, step
        if of is not call.forward:
            of, step = call.forward, Amount()
        held = entries(call.cache, call.query.shape[0])
        step.held += held
        index = choose(call)
        if index is None:
            return None
        step.unread += held - (index >= 0).sum()
        return call.held.pick(index)

    def begin(cache: StudioCache, forward: Forward) -> None:
        nonlocal total
        total = Amount()

    def account(cache: StudioCache, forward: Forward) -> None:
        if of is not forward:
            return
        unread = float(step.unread)
        total.held, total.unread = total.held + float(step.held), total.unread + unread
        session.counts["unread_kv_share"] = float(total.unread) / max(1.0, float(total.held))
        if unread:
            session.did(policy, unread)

    reads, begins = session.having(reading=read), session.hooked(session.after_prefill, begin)
    with reads, begins, session.hooked(session.after_step, account):
        yield


def entries(layer: KVLayer, rows: int) -> int | Tensor:
    """Entries that a layer holds, of all rows and heads, padding not counted."""
    found: int | Tensor = 0
    for g in layer.groups:
        heads = g.stop - g.start
        if g.padded and g.positions is not None:
            found += (g.positions != PADDING).sum() * (heads // g.positions.shape[1])
        else:
            found += rows * heads * g.store.length
    return found
