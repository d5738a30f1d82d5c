"""How layers share a cache budget: the arithmetic alone."""

from __future__ import annotations

from typing import Literal

import numpy as np

from studio_state.errors import SpecError

Rule = Literal["uniform", "pyramid", "given"]


def layer_shares(keep: float, layers: int, rule: Rule = "uniform", slope: float = 20.0, given: str = "") -> list[float]:
    """Share of the prompt that each layer keeps; their mean is ``keep``, none is above 1.

    Args:
        slope: of ``pyramid``: the last layer gets 1 / slope of the mean, the first so much more, a straight line between
            (Cai et al. 2024, PyramidKV, arXiv:2406.02069, section 4.2).
        given: of ``given``: relative budgets at evenly spaced depths, first layer to last, for example ``"2, 1, 1"``.

    Raises:
        SpecError: ``given`` is not a list of positive numbers.
    """
    if rule == "uniform" or layers == 1:
        return [keep] * layers
    if rule == "pyramid":
        last = max(keep / slope, 2 * keep - 1)  # a first layer that cannot hold more leaves the rest to the others
        return [float(x) for x in np.linspace(2 * keep - last, last, layers)]
    points = relative(given)
    weights = np.interp(np.linspace(0, 1, layers), np.linspace(0, 1, len(points)), points)
    return _filled(weights, keep * layers)


def relative(given: str) -> list[float]:
    """The numbers of a comma-separated list of relative budgets.

    Raises:
        SpecError: it is empty, or something in it is no positive number.
    """
    try:
        points = [float(part) for part in given.split(",")]
    except ValueError:
        points = []
    if not points or not all(0 < x < float("inf") for x in points):
        raise SpecError(
            f"layer_shares = {given!r}: give positive numbers with commas between, first layer to last, for example 2, 1, 1"
        )
    return points


def _filled(weights: np.ndarray, total: float) -> list[float]:
    """Shares in proportion to the weights that add up to ``total``, none above 1: what one cannot hold goes to the others."""
    shares, full = np.zeros_like(weights), np.zeros(len(weights), dtype=bool)
    while True:
        rest = total - full.sum()
        shares = np.where(full, 1.0, weights * rest / max(weights[~full].sum(), 1e-12))
        over = ~full & (shares > 1)
        if not over.any():
            return [float(x) for x in shares]
        full |= over
