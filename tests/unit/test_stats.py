"""Statistics against hand-worked values, scipy, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from studio_state.stats import mcnemar, paired_bootstrap, ratio_interval, smallest_detectable_difference, summary, wilson


@pytest.mark.parametrize("noise", ["normal", "heavy", "spikes"])
@pytest.mark.parametrize("n", [3, 5, 9, 20])
def test_interval_of_a_ratio_covers(n: int, noise: str) -> None:
    """A/A pairs with drift: about 95 % of the intervals hold the true ratio, here 1.3."""
    rng = np.random.default_rng([n, len(noise)])

    def times() -> np.ndarray:
        if noise == "heavy":
            return np.exp(0.03 * rng.standard_t(3, n))
        spikes = np.where(rng.random(n) < 0.1, 1 + rng.exponential(0.5, n), 1) if noise == "spikes" else 1
        return np.exp(0.03 * rng.standard_normal(n)) * spikes

    trials, hits = 250, 0
    for _ in range(trials):
        drift = np.exp(np.cumsum(0.02 * rng.standard_normal(n)))
        found = ratio_interval(1.3 * times() * drift, times() * drift, resamples=300)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 1.3 <= found.high
    assert 0.91 <= hits / trials <= 1.0


def test_interval_finds_a_real_difference_and_is_deterministic() -> None:
    rng = np.random.default_rng(1)
    lane, reference = 2.0 * np.exp(0.05 * rng.standard_normal(9)), np.exp(0.05 * rng.standard_normal(9))
    found = ratio_interval(lane, reference)
    assert found == ratio_interval(lane, reference)
    assert found.low is not None
    assert found.high is not None
    assert 1.0 < found.low < found.value < found.high < 3.0
    back = ratio_interval(reference, lane)
    assert back.value == pytest.approx(1 / found.value)


def test_interval_by_hand() -> None:
    # three pairs, nothing is trimmed: the geometric mean of 1, 2 and 4 is 2
    assert ratio_interval([1, 2, 4], [1, 1, 1]).value == pytest.approx(2)
    # eight pairs: the two smallest and the two largest ratios are cut off, a wild one among them
    assert ratio_interval([3, 3, 3, 3, 1, 1, 900, 1e6], [1] * 8).value == pytest.approx(3)
    same = ratio_interval([5, 5, 5], [10, 10, 10])
    assert (same.value, same.low, same.high, same.n) == (0.5, 0.5, 0.5, 3)
    one = ratio_interval([2.0], [1.0])
    assert (one.value, one.low, one.high, one.n) == (2.0, None, None, 1)


def test_interval_of_three_pairs_is_near_students() -> None:
    logs = np.array([0.1, 0.2, 0.35])
    found = ratio_interval(np.exp(logs), np.ones(3), resamples=20_000)
    low, high = scipy_stats.t.interval(0.95, 2, logs.mean(), scipy_stats.sem(logs))
    assert found.low is not None
    assert found.high is not None
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((low, high), abs=0.01)


@pytest.mark.parametrize(
    ("lane", "reference", "words"),
    [([1, 2], [1], "give pairs"), ([], [], "at least one"), ([0.0], [1.0], "greater than 0"), ([math.nan], [1.0], "finite")],
)
def test_bad_pairs_are_refused(lane: list[float], reference: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ratio_interval(lane, reference)


def test_summary() -> None:
    s = summary([1, 2, 3, 4, 10])
    assert (s.n, s.median, s.mean, s.p50, s.p99) == (5, 3, 4, 3, None)
    assert s.p90 == pytest.approx(7.6)
    assert s.cv == pytest.approx(math.sqrt(50 / 4) / 4)
    assert summary(range(100)).p99 == pytest.approx(98.01)
    assert summary(range(99)).p99 is None
    assert summary([7]).cv is None


def test_mcnemar_by_hand() -> None:
    # 8 items only A got right, 2 only B: p = 2 (1 + 10 + 45) / 1024
    a = [True] * 8 + [False] * 2 + [True] * 5 + [False] * 3
    b = [False] * 8 + [True] * 2 + [True] * 5 + [False] * 3
    found = mcnemar(a, b)
    assert (found.only_a, found.only_b, found.n) == (8, 2, 18)
    assert found.p_value == pytest.approx(112 / 1024)
    assert mcnemar(a, a).p_value == 1.0
    with pytest.raises(ValueError, match="give pairs"):
        mcnemar([True], [])


def test_wilson_by_the_formula() -> None:
    n, p, z = 10, 0.8, scipy_stats.norm.ppf(0.975)
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    found = wilson(8, 10)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, centre - half, centre + half))
    assert wilson(0, 5).low == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="is no share"):
        wilson(3, 2)


def test_paired_bootstrap_covers_and_agrees_with_student() -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(1.0, 1, 200)
    b = a - 0.25 + rng.normal(0, 0.5, 200)
    found = paired_bootstrap(a, b)
    t = scipy_stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.value == pytest.approx(float(np.mean(a - b)))
    assert (found.low, found.high) == pytest.approx((t.low, t.high), abs=0.01)


def test_smallest_detectable_difference_by_hand() -> None:
    # 6 of 100 items differ: only 6 to 0 is significant (2/64); P(6 to 0) = 0.8 where the loser's share is 1 - 0.8^(1/6)
    loser = 1 - 0.8 ** (1 / 6)
    assert smallest_detectable_difference(100, 0.06) == pytest.approx((1 - 2 * loser) * 0.06, abs=1e-6)
    assert smallest_detectable_difference(100, 0.05) is None  # 5 to 0 has p = 2/32
    values = [smallest_detectable_difference(n) for n in (100, 200, 400, 800, 1600)]
    assert None not in values
    assert values == sorted(values, reverse=True)


def test_smallest_detectable_difference_has_its_power() -> None:
    n, disagreement = 400, 0.1
    difference = smallest_detectable_difference(n, disagreement)
    assert difference is not None
    rng = np.random.default_rng(5)
    wins = rng.binomial(40, (1 + difference / disagreement) / 2, 2000)
    significant = [scipy_stats.binomtest(int(w), 40, 0.5).pvalue < 0.05 for w in wins]
    assert 0.77 <= np.mean(significant) <= 0.83
