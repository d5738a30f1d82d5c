"""Sentences on cards: which difference n items can show, at the 5 % level with 80 % power.

All comparisons are paired: every lane runs the same items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.stats import t

from studio_state.stats import smallest_detectable_difference

LEVEL, POWER = 0.95, 0.80
CHANGING = 0.2  # share of the answers assumed to differ between two lanes


def accuracies(noun: str, sizes: Sequence[int]) -> str:
    """Sentence for a share of right answers, compared by McNemar's exact test."""
    needed = fewest_changes()
    shown = [_points(n, needed) for n in sizes]
    return (
        f"Number of {noun}: {'; '.join(shown)} (exact McNemar test, 5 % level, 80 % power, a fifth of the answers changing; "
        f"fewer than {needed} changed answers never show anything)."
    )


def _points(items: int, needed: int) -> str:
    difference = smallest_detectable_difference(items, CHANGING, level=LEVEL, power=POWER)
    if difference is None:
        return f"{items} show only {needed} or more answers lost and none won, {100 * needed / items:.0f} points"
    return f"{items} show a difference of about {100 * difference:.0f} points"


def fewest_changes() -> int:
    """Fewest changed answers, all in one direction, that the test finds significant."""
    return next(n for n in range(1, 100) if smallest_detectable_difference(n, 1.0, level=LEVEL, power=POWER) is not None)


def means(noun: str, metric: str, sizes: Sequence[int], scatter: float, unit: str) -> str:
    """Sentence for a mean over items whose paired differences have a standard deviation of ``scatter``."""
    shown = [f"{n} show a change of {metric} of about {100 * smallest_shift(n, scatter):.2g} %" for n in sizes]
    return f"Number of {noun}: {'; '.join(shown)} (paired t test, 5 % level, 80 % power, if {unit} scatter by {100 * scatter:.2g} %)."


def smallest_shift(items: int, scatter: float) -> float:
    """Mean of paired differences that a two-sided t test finds: (t(1 - a/2) + t(power)) * scatter / sqrt(n), n - 1 degrees."""
    free = items - 1
    return float((t.ppf((1 + LEVEL) / 2, free) + t.ppf(POWER, free)) * scatter / math.sqrt(items))
