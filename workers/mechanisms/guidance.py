"""Classifier-free guidance seen from the denoiser: which steps keep it, and how a doubled batch is halved.

Under guidance (Ho & Salimans 2022, arXiv:2207.12598, section 3.2) the pipeline gives the denoiser every picture
twice, conditional and unconditional, as one batch.

Shapes: B pictures; the denoiser gets and gives [2B, ...].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from studio_state.errors import Unavailable
from workers.mechanisms.denoising import Denoising


def guided_steps(where: str, keep: float, of: int) -> set[int]:
    """Steps that keep guidance: ``keep`` of all, rounded, at least one.

    Args:
        where: ``first``: from the start; ``middle``: as many left out before as after (one more after, where they are
            odd); ``every``: evenly spaced from the first step on.
        of: steps in all.
    """
    count = max(1, round(keep * of))
    if where == "every":
        return {turn * of // count for turn in range(count)}
    start = (of - count) // 2 if where == "middle" else 0
    return set(range(start, start + count))


def conditional_half(given: tuple[tuple[Any, ...], dict[str, Any]], state: Denoising) -> Any:
    """Arguments of the denoiser, with every tensor that has a row for each half cut to the conditional one.

    Such tensors are known by their first dimension; they may lie in tuples, lists and dictionaries.
    """
    args, kwargs = given
    sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    if not isinstance(sample, Tensor):
        raise Unavailable("the denoiser of this pipeline was called without a sample first; guidance cannot be left out of it")
    rows = len(sample)

    def cut(x: Any) -> Any:
        if isinstance(x, Tensor):
            return state.halves(x)[0] if x.ndim and len(x) == rows else x
        if isinstance(x, Mapping):
            return {name: cut(inner) for name, inner in x.items()}
        return type(x)(map(cut, x)) if type(x) in (tuple, list) else x

    return cut(args), cut(kwargs)


def prediction(out: Any) -> Tensor:
    """The output of a denoiser, whichever form it gave it in."""
    found: Tensor = out[0] if isinstance(out, tuple) else out.sample
    return found


def with_prediction(out: Any, prediction: Tensor) -> Any:
    """The denoiser's output with another tensor in the place of its own, in the same form."""
    if isinstance(out, tuple):
        return (prediction, *out[1:])
    return type(out)(sample=prediction)
