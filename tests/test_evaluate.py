"""The interval that every accuracy is reported with."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from ssm_retrieval.statistics import wilson

counts = st.one_of(st.integers(1, 300), st.integers(1, 10**12)).flatmap(
    lambda n: st.tuples(st.one_of(st.sampled_from([0, 1, n - 1, n]), st.integers(0, n)), st.just(n))
)


@settings(deadline=None, max_examples=500)
@given(counts)
@example((0, 3))
@example((1024, 1024))
def test_wilson_interval_contains_the_rate_and_mirrors(observed):
    """Whatever the rounding; and a bound is 0 or 1 exactly where the rate is."""
    correct, count = observed
    low, high = wilson(correct, count)
    assert 0.0 <= low <= correct / count <= high <= 1.0
    assert (low == 0.0) == (correct == 0) and (high == 1.0) == (correct == count)
    mirrored = wilson(count - correct, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_is_that_of_scipy(observed):
    want = stats.binomtest(*observed).proportion_ci(0.95, method="wilson")
    assert wilson(*observed) == pytest.approx((want.low, want.high), rel=1e-9, abs=1e-12)


def test_nothing_is_known_without_observations():
    assert wilson(0, 0) == (0.0, 1.0)
