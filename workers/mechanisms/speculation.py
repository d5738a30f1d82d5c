"""Speculative decoding: draft several tokens, check them in one forward pass, take back what was wrong.

The drafts are certain guesses (no distribution of their own), so one rule is exact both for greedy
decoding and for sampling: draw from the model's own distribution at each place, in order, and go on only
while the draw equals the draft. Draws and their random numbers are those of plain decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from workers.families.batches import State
from workers.families.llm import Generation
from workers.session import Session

DRAFTS: dict[str, Any] = {
    "stage": "decode",
    "families": ("llm", "vlm"),
    "workloads": ("needle", "prompts", "speed"),
    "owns": ("decode.loop",),
    "needs": ("kv.rollback",),
    "effects": {"forward_passes": "down", "accepted_tokens": "up"},
    "hopes": {"decode_tokens_per_s": "up"},
    "neutral": {"draft": 0},
    "max_batch": 1,
}  # what the cards of policies that guess tokens and have them verified have in common

Propose = Callable[[Sequence[int]], Sequence[int]]
Draft = Callable[[Sequence[int], int], Sequence[int]]


def speculating(session: Session, policy: str, propose: Propose) -> AbstractContextManager[None]:
    """Decode with drafts that depend on the text alone.

    Args:
        propose: prompt and new tokens so far -> tokens that may come next; may be empty.
    """
    return drafting(session, policy, lambda session, run: lambda history, most: propose(history))


@contextmanager
def drafting(session: Session, policy: str, begin: Callable[[Session, Generation], Draft]) -> Iterator[None]:
    """Decode with drafts of somebody who follows the text as it grows.

    Args:
        begin: called once a text, when its first token is known. What it returns is called before every pass:
            (prompt and new tokens so far, the most tokens that are of use) -> tokens that may come next; may be empty.
    """

    def decode(session: Session, run: Generation) -> Iterator[list[list[int]]]:
        draft_next = begin(session, run)
        history = [*run.trace.results[0].prompt_ids, int(run.first[0])]
        end = len(run.trace.results[0].prompt_ids) + run.limit
        while True:
            most = max(0, end - len(history) - 1)  # the last token needs no draft
            draft = list(draft_next(history, most))[:most]
            new = verify(session, run, history[-1], draft)
            session.count("drafted_tokens", len(draft))
            session.count("accepted_tokens", len(new) - 1)
            if draft:
                session.did(policy, len(draft))
            history += new
            yield [new]

    with session.having(decoder=decode):
        yield


def verify(session: Session, run: Generation, last: int, draft: Sequence[int]) -> list[int]:
    """One forward over the last token and the draft: the accepted part of it and one token more.

    The cache then holds everything but the newest token, as after a plain step.
    """
    ids = torch.tensor([[last, *draft]], device=session.device)
    logits = run.family.step(session, run.state, ids)  # [1, 1 + len(draft), V]
    new: list[int] = []
    for place in range(len(draft) + 1):
        new.append(int(run.sampler.draw(logits[:, place])[0]))
        if place < len(draft) and new[-1] != draft[place]:
            break
    take_back(run.state, len(draft) + 1 - len(new))
    run.state.logits = logits[:, len(new) - 1]
    return new


def take_back(state: State, count: int) -> None:
    """Let a generation be where it was before its newest ``count`` tokens; its logits stay those of the last forward."""
    state.cache.crop_newest(count)
    state.next_position = state.next_position - count


def lookup(history: Sequence[int], longest: int, count: int) -> list[int]:
    """What followed the latest earlier occurrence of the newest n-gram, the longest that occurred.

    Args:
        longest: n-grams of this length are tried first, then shorter ones.
        count: tokens returned at most.
    """
    size = len(history)
    for n in range(min(longest, size - 1), 0, -1):
        ending = history[size - n :]
        for start in range(size - n - 1, -1, -1):
            if history[start : start + n] == ending:
                return list(history[start + n : start + n + count])
    return []
