"""Reusing a denoiser's work from an earlier step: what is kept for each of its calls, and what blocks give that do not run.

Most pipelines call the denoiser once a step; some twice, for what is asked and for nothing. Each of a step's calls keeps
its own, so that a call is compared with its own past only.

Shapes: B rows of the denoiser's batch, N tokens of D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from workers.mechanisms.denoising import Denoising, denoising
from workers.session import Session

T = TypeVar("T")
States = tuple[Tensor | None, ...]  # of the picture [B, N, D], and of the text [B, L, D] where blocks change it too
Form = tuple[Any, ...] | None  # of what a block gives: None stands for a tensor


@dataclass
class Call:
    """Which of a step's calls of the denoiser runs, from 0."""

    step: int = -1
    number: int = 0


def begun(state: Denoising, policy: str, make: Callable[[], T]) -> T:
    """What a policy keeps for the call that begins; made where this is the first of its kind in the batch."""
    call = state.keep((policy, Call), Call)
    call.step, call.number = state.step, call.number + 1 if call.step == state.step else 0
    return running(state, policy, make)


def running(state: Denoising, policy: str, make: Callable[[], T]) -> T:
    """What a policy keeps for the call that runs."""
    return state.keep((policy, state.keep((policy, Call), Call).number), make)


def note_hit(session: Session, policy: str, share: float) -> None:
    """The running step takes a share of its work from an earlier one; it counts once, however many calls it has."""
    state = denoising(session)
    if not state.reused[state.step]:
        session.did(policy)
        session.count("cache_hits", 1)
    state.note_reuse(share)


# -- transformer blocks ----------------------------------------------------------------------
def states_of(out: Any) -> States:
    """What a transformer block gives, the picture's first: blocks that work on both give (text, picture)."""
    return (out,) if isinstance(out, Tensor) else (out[1], out[0])


def as_output(states: States) -> Any:
    """States in the form in which a block gives them."""
    return states[0] if len(states) == 1 else (states[1], states[0])


def alike(a: States, b: States) -> bool:
    """Whether one can be added to the other, state by state; a last block may give no text."""
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(x is None or y is None or x.shape == y.shape for x, y in pairs)


def minus(a: States, b: States) -> States:
    """The difference, state by state; none where one of them has none."""
    return tuple(None if x is None or y is None else x - y for x, y in zip(a, b, strict=True))


def plus(a: States, b: States) -> States:
    """The sum, state by state; none where one of them has none."""
    return tuple(None if x is None or y is None else x + y for x, y in zip(a, b, strict=True))


# -- blocks of any form ----------------------------------------------------------------------
def form_of(out: Any) -> Form:
    """How many tensors a block gives, and how they are nested."""
    return tuple(form_of(x) for x in out) if isinstance(out, tuple) else None


def hollow(form: Form, passed: Tensor) -> Any:
    """An output of this form that nothing was computed for; for places where it is handed on and never read."""
    return passed if form is None else tuple(hollow(x, passed) for x in form)
