"""Learning curves whose limit is known: with and without noise, and those that have none to see."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from probes.extrapolation import limit

SIZES = np.repeat([64, 128, 256, 512, 1024], [3, 3, 3, 2, 1])


@pytest.mark.parametrize("rate", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("top", [9.0, 15.0])
def test_a_curve_without_noise_ends_at_its_limit(top, rate):
    found = limit(SIZES, top - 6 * (SIZES / 64) ** -rate, 16)
    assert found.value == pytest.approx(top, abs=0.05) and found.why_not == ""
    assert found.low <= found.value <= found.high <= found.low + 0.4


def test_a_flat_curve_is_its_own_limit():
    found = limit(SIZES, np.full(len(SIZES), 4.0), 16)
    assert found.value == pytest.approx(4, abs=0.02)


def noisy(rng):
    return 9 - 5 * (SIZES / 64) ** -0.6 + rng.normal(0, 0.1, len(SIZES))


def test_the_ends_of_the_interval_are_those_of_the_profile():
    """Found by another optimiser: beyond them even the best curve misses more than the F test allows."""
    value = noisy(np.random.default_rng(3))

    def missed(top=None):
        """The least sum of squares, with a given limit or any."""

        def residuals(p):
            limit_ = p[2] if top is None else top
            return limit_ - p[0] * (SIZES / 64) ** -np.exp(p[1]) - value

        start = [5.0, -0.5] + ([9.0] if top is None else [])
        return 2 * optimize.least_squares(residuals, start, xtol=1e-12).cost

    found, free = limit(SIZES, value, 16, 0.9), len(SIZES) - 3
    allowed = missed() * (1 + stats.f.ppf(0.9, 1, free) / free)
    step = 14 / 600
    for end, outwards in ((found.low, -step), (found.high, step)):
        assert (
            missed(end - 0.1 * outwards) <= allowed * 1.01 and missed(end + 1.1 * outwards) >= allowed * 0.99
        )
    assert missed(found.value) <= missed() * 1.01


@pytest.mark.slow
def test_the_interval_holds_the_limit_about_as_often_as_it_says():
    """At the confidence given; what cannot be extrapolated has an interval that goes up to the ceiling."""
    rng = np.random.default_rng(0)
    for confidence, least, most in ((0.95, 0.90, 1.0), (0.5, 0.36, 0.64)):
        held = 0
        for _ in range(150):
            found = limit(SIZES, noisy(rng), 16, confidence)
            held += found.low <= 9 <= found.high
        assert least <= held / 150 <= most


def test_what_grows_with_the_logarithm_is_not_extrapolated():
    found = limit(SIZES, 2 + np.log2(SIZES / 64), 16)
    assert np.isnan(found.value) and found.high == 16 and 6 < found.low < 16
    assert "ceiling" in found.why_not


def test_too_few_measurements_are_not_extrapolated():
    for n in ([100, 200, 400], [100, 100, 100, 200, 200]):
        found = limit(n, np.arange(len(n)) / 10, 1)
        assert np.isnan([found.value, found.low, found.high]).all() and "too few" in found.why_not


def test_refusals():
    with pytest.raises(ValueError, match="as many positive numbers"):
        limit([1, 2, 0, 4], [0, 0, 0, 0], 1)
    with pytest.raises(ValueError, match="as many positive numbers"):
        limit([1, 2, 3], [0, 0], 1)
    with pytest.raises(ValueError, match="above the ceiling 1"):
        limit([1, 2, 3, 4], [0, 0, 0, 2], 1)
    with pytest.raises(ValueError, match="confidence"):
        limit([1, 2, 3, 4], [0, 0, 0, 0], 1, confidence=2)
