"""Reading a text again on top of its own cache: what its second reading asks of the entries of the first.

A prompt "repeat the previous context" and the text itself, piece by piece, pass through the model; every layer tells
the largest attention that any of these queries paid to each cached entry, and forgets them again at once.
Kim et al. 2025, KVzip, arXiv:2505.23416, section 3.

Shapes: B batch, Hq query heads, H KV heads, S stored entries, T tokens of a piece and the words around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from studio_state.errors import WorkloadError
from workers.families.llm import LanguageFamily
from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.eviction import most_attention
from workers.session import Session

FIRST = "\n\nRepeat the previous context exactly."
NEXT = "\n\nRepeat the part of the previous context exactly, starting with"
OPEN = "\n"  # between the request and the text
OVERLAP = 8  # tokens before a later piece that say where it starts


@dataclass(frozen=True)
class Request:
    """What the model is asked with, as token ids."""

    first: list[int]
    next: list[int]
    open: list[int]

    @staticmethod
    def of(session: Session) -> Request:
        """In the words of the released code."""
        return Request(*(session.processor.encode(text, add_special_tokens=False) for text in (FIRST, NEXT, OPEN)))

    @property
    def longest(self) -> int:
        """Tokens around a piece, at most."""
        return max(len(self.first), len(self.next) + OVERLAP) + len(self.open)

    def pieces(self, text: Sequence[int], start: int, length: int) -> list[list[int]]:
        """The text from ``start`` on, ``length`` tokens at a time, each behind the words that ask for it."""
        places = range(start, len(text), length)
        return [
            [*(self.next + list(text[max(0, at - OVERLAP) : at]) if at else self.first), *self.open, *text[at : at + length]]
            for at in places
        ]


def read_again(
    session: Session, read: Forward, texts: Sequence[Sequence[int]], starts: Sequence[int], length: int, name: str
) -> None:
    """Read texts again behind what was just read, and note in every layer how much each entry is asked for.

    Args:
        read: the forward behind which it happens; the cache is the same before and after.
        texts: per row all that was read, padding not counted; starts: per row from where on it is read again.
        length: tokens of a piece; fewer where the model's context leaves no room for more.
        name: in :attr:`~workers.mechanisms.cache.HeadGroup.tracked` the largest attention [B, H, S] to each entry so far.

    Raises:
        WorkloadError: the model's context leaves no room at all.
    """
    request, longest = Request.of(session), max(map(len, texts))
    room = (session.info.context or longest + request.longest + length) - longest - request.longest
    if room < 1:
        raise WorkloadError(
            f"a prompt of {longest} tokens leaves no room in the context of {session.info.context} tokens of {session.info.name} "
            f"to read it again, which takes at least {request.longest + 1} more; shorten the prompt"
        )
    rows = [request.pieces(text, start, min(length, room)) for text, start in zip(texts, starts, strict=True)]
    for piece in range(max(map(len, rows))):
        session.check_cancelled()
        _ask(session, read, [row[piece] if piece < len(row) else [] for row in rows], name)
        session.count("forward_passes", 1)


def _ask(session: Session, read: Forward, rows: Sequence[Sequence[int]], name: str) -> None:
    """One piece of every row; shorter ones are filled up behind their end, where nothing that counts sees it."""
    device, count = read.positions.device, max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (count - len(row))] for row in rows], device=device)
    counted = torch.arange(count, device=device) < torch.tensor([[len(row)] for row in rows], device=device)

    def vote(call: AttentionCall) -> None:
        votes, seen = most_attention(call, counted)[..., :-count], call.forward.seen - count
        for group in call.cache.groups:
            group.crop(count)
            group.store = group.store.heads(0, group.stop - group.start)  # without the room that these entries took
        call.cache.seen = seen
        before = call.held.tracked.get(name)
        call.cache.track(name, votes if before is None else torch.maximum(before, votes))

    forward = Forward(
        cache=read.cache,
        phase="decode",
        positions=read.positions[:, -1:] + 1 + torch.arange(count, device=device),
        padded=read.padded,
        prompt_lengths=read.prompt_lengths,
        kernel=read.kernel,
        observers=[vote],
        attending=read.attending,
        ids=ids,
        seen=read.seen + count,
    )
    LanguageFamily().library_forward(session, ids, forward, last_only=True)
