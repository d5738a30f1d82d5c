"""How far the memory estimates were off: what was expected before loading against the peak that was then measured. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import NamedTuple

from studio_state.experiment import MemoryEstimate


class EstimateErrors(NamedTuple):
    """Over some runs.

    Attributes:
        median: of the runs' errors without their sign, as a share of the measured peak.
        worst: the error that is furthest off, with its sign: -0.2 = a fifth too little was expected.
        runs: lanes that were compared.
    """

    median: float
    worst: float
    runs: int

    def sentence(self) -> str:
        """For people."""
        over = "1 run" if self.runs == 1 else f"{self.runs:,} runs"
        return f"estimates were off by {100 * self.median:.0f} % at the median over {over} (worst {100 * self.worst:+.0f} %)"


def expected(estimate: MemoryEstimate, lane: int) -> int | None:
    """Bytes expected of one lane; None where only the baseline was estimated."""
    if lane < len(estimate.lane_bytes):
        return estimate.lane_bytes[lane]
    return estimate.total if lane == 0 else None


def estimate_errors(needs: Iterable[tuple[MemoryEstimate, int, float]]) -> EstimateErrors | None:
    """Compare estimates with measured peaks; None where nothing can be compared.

    Args:
        needs: estimate, lane, measured peak in bytes, as :meth:`studio_state.history.History.memory_needs` gives them.
    """
    errors = [found / peak - 1 for estimate, lane, peak in needs if (found := expected(estimate, lane)) and peak > 0]
    if not errors:
        return None
    return EstimateErrors(statistics.median(map(abs, errors)), max(errors, key=abs), len(errors))
