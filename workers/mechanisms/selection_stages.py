"""Where several selections of prompt tokens lie in the depth of a model, and how many tokens each leaves: the arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from studio_state.errors import SpecError


def evenly(stages: int, keep: float, depth: float) -> tuple[list[float], list[float]]:
    """Depths and shares of so many stages: the first at ``depth``, the last leaves ``keep``, by equal steps and factors."""
    depths = [depth + (1 - depth) * i / stages for i in range(stages)]
    return depths, [float(keep ** ((i + 1) / stages)) for i in range(stages)]


def given_depths(text: str, stages: int) -> list[float]:
    """The numbers of a comma-separated list of depths.

    Raises:
        SpecError: they are not as many as stages, not from 0 to 1, or do not rise.
    """
    found = _numbers(text)
    if len(found) != stages or not all(0 <= x <= 1 for x in found) or any(b <= a for a, b in pairwise(found)):
        raise SpecError(f"depths = {text!r}: give {_asked(stages)} from 0 to 1, each above the one before, for example 0.3, 0.6")
    return found


def given_shares(text: str, stages: int) -> list[float]:
    """The numbers of a comma-separated list of shares of the prompt.

    Raises:
        SpecError: they are not as many as stages, not above 0 and up to 1, or rise.
    """
    found = _numbers(text)
    if len(found) != stages or not all(0 < x <= 1 for x in found) or any(b > a for a, b in pairwise(found)):
        raise SpecError(
            f"keeps = {text!r}: give {_asked(stages)} above 0 and up to 1, none above the one before, for example 0.5, 0.2"
        )
    return found


def held_share(depths: Sequence[float], shares: Sequence[float], cut: int) -> float:
    """Share of the prompt that all layers together hold behind the prefill.

    Args:
        cut: so many stages cut the cache of the layers before them to what the last of these stages left.
    """
    edges, held = [0.0, *depths, 1.0], [1.0, *shares]
    held[:cut] = [shares[cut - 1]] * cut if cut else []
    return sum((b - a) * x for (a, b), x in zip(pairwise(edges), held, strict=True))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return []


def _asked(stages: int) -> str:
    return f"{stages} number{'s' if stages > 1 else ''} (one a stage, with commas between)"
