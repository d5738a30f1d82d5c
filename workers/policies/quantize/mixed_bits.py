"""Mixed bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import gcd
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from studio_state.catalog import Card
from studio_state.errors import SpecError
from workers.mechanisms.calibration import Want, gathered
from workers.mechanisms.linear import matrix_of
from workers.mechanisms.output_error import output_error, rounded
from workers.mechanisms.rounding import ROW_BITS, GroupedPolicy
from workers.mechanisms.weight_places import places
from workers.mechanisms.weight_policy import QUANTIZES, CalibratedPolicy, Spot
from workers.methods import card, knob
from workers.session import Session

MOMENT: frozenset[Want] = frozenset({"moment"})
UNITS = 1 << 16  # of the budget, at most; above that the sizes of maps are rounded up to coarser units


class MixedBits(CalibratedPolicy, GroupedPolicy):
    """Give each linear map its own number of bits, so that rounding costs the outputs least at a given average.

    Folklore since mixed-precision search; nearest are Dong et al. 2019 (HAWQ-V2), arXiv:1911.03852, a sensitivity a layer
    under a budget of size, and Yao et al. 2020 (HAWQ-V3), arXiv:2011.10680, section 3.4, which solves for the widths exactly
    by integer programming. Here a map's cost at each width from ``low`` to ``high`` is the mean square that rounding to the
    nearest adds to its output on the calibration inputs, by their second moment, over the mean square of the output itself;
    the sum over all maps is made least by dynamic programming over the budget. The sensitivity is thus measured rather than
    taken from the curvature of the loss, and maps count as independent.

    The average counts code bits of all weights given here, without scales; the metric ``mean_bits`` shows the one that is
    stored (the head's 8 bits with ``head=int8`` included). How many maps got which width is told while they are built. Maps
    that no calibration input reaches are judged as if their inputs were independent and equally strong. Maps of different widths
    are not fused by lean-decode; widths other than 4 and 8 have no fast CPU kernel. Convolutions stay as they are.
    """

    card: ClassVar[Card] = card(
        id="mixed-bits",
        title="Mixed bits",
        not_neutral_because="every setting rounds; with low = high it is round-to-nearest at that width",
        **QUANTIZES,
    )

    bits: float = knob(4.0, ge=2, le=8, help="average bits a weight over the maps; fewer = smaller, less exact")  # type: ignore[assignment]
    low: int = knob(2, ge=2, le=8, help="fewest bits that a map may get; at most bits")
    high: int = knob(8, ge=2, le=8, help="most bits that a map may get; at least bits")
    group_size: Literal[32, 64, 128, 256] = knob(
        32,
        help="below 8 bits: inputs that share a scale; larger = smaller, less exact",
        fits="divides-widths",
        when={"low": list(range(2, ROW_BITS))},
    )

    def plan(self, session: Session, names: Sequence[str]) -> Mapping[str, int]:
        """Bits of each map.

        Raises:
            SpecError: the average lies outside of low to high.
        """
        if not self.low <= self.bits <= self.high:
            raise SpecError(
                f"{self.card.id}: bits = {self.bits:g} is the average of widths from low = {self.low} to high = {self.high} "
                "and cannot lie outside of them; change one of the three"
            )
        head, widths = places(session).head, range(self.low, self.high + 1)
        inside = [n for n in names if n != head or self.head == "same"]
        costs: dict[str, list[float]] = {}
        for group, seen in gathered(session, inside, MOMENT, self.samples):
            for name in group:
                session.check_cancelled()
                session.say(f"{self.card.title}: sensitivity of {name}", len(costs) / len(inside))
                weight = matrix_of(session.model.get_submodule(name)).detach().float()
                self.check_width(weight.shape[1], self.low, self.group_size, name)
                costs[name] = self.costs(weight, seen[name].moment if name in seen else None, widths)
        sizes = [matrix_of(session.model.get_submodule(n)).numel() for n in inside]
        chosen = [widths[i] for i in allocate(sizes, [costs[n] for n in inside], widths, self.bits)]
        counts = ", ".join(f"{n} in {b} bits" for b, n in sorted(Counter(chosen).items()))
        session.say(f"{self.card.title}: of {len(chosen)} maps {counts}", None)
        return dict(zip(inside, chosen, strict=True))

    def costs(self, weight: Tensor, moment: Tensor | None, widths: Sequence[int]) -> list[float]:
        """What each width adds to the mean square of the output of [N, K], as a share of it."""
        known = torch.eye(weight.shape[1]) if moment is None else moment
        known = known.to(weight.device)
        whole = float(output_error(weight, known).sum(dtype=torch.float64)) or 1.0  # no output at all: nothing can be lost
        changes = (rounded(weight, b, self.group_size) - weight for b in widths)
        return [float(output_error(c, known).sum(dtype=torch.float64)) / whole for c in changes]

    def format_of(self, spot: Spot) -> tuple[int, int]:
        """The bits that the plan gives to one map."""
        return spot.plan[spot.name], self.group_size


def allocate(sizes: Sequence[int], costs: Sequence[Sequence[float]], widths: Sequence[int], average: float) -> list[int]:
    """Which of the ascending widths each of some matrices gets (its place among them), for the least sum of costs.

    Exact where the sizes have a common divisor that leaves at most :data:`UNITS` units of budget; else sizes are rounded up to
    units, so the budget holds all the same. Of equal costs the fewer bits are taken.

    Args:
        sizes: weights of each.
        costs: of each at each width.
        average: bits a weight over all of them, at least the first width.
    """
    spare = (Fraction(average).limit_denominator(10_000) - widths[0]) * sum(sizes)  # bits above the lowest width
    unit = max(1, gcd(*sizes), -int(-spare // UNITS))
    room = int(spare // unit)
    best, picks = np.zeros(room + 1), []  # least cost so far with at most so many units
    for size, mine in zip(sizes, costs, strict=True):
        tried = np.full((len(widths), room + 1), np.inf)
        for i, (width, cost) in enumerate(zip(widths, mine, strict=True)):
            needed = -(-size // unit) * (width - widths[0])
            if needed <= room:
                tried[i, needed:] = best[: room + 1 - needed] + cost
        picks.append(tried.argmin(0).astype(np.int8))
        best = tried.min(0)
    chosen = []
    for size, pick in zip(reversed(sizes), reversed(picks), strict=True):
        chosen.append(int(pick[room]))
        room -= -(-size // unit) * (widths[chosen[-1]] - widths[0])
    return chosen[::-1]
