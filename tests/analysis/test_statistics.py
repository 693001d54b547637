"""Survival curves, intervals and paired tests against scipy, closed forms and enumeration."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.tables import between
from ssm_retrieval.statistics import (
    bootstrap,
    bootstrap_median_time,
    geometric_mean_interval,
    holm,
    kaplan_meier,
    mean_interval,
    median_time,
    paired_sign_test,
    paired_test,
    ratio_of_means,
    require,
    share_interval,
    sign_flip_p,
)

runs = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=20)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- survival ---


@settings(deadline=None, max_examples=60)
@given(runs)
def test_kaplan_meier_is_scipys(pairs):
    value, reached = (np.array(x) for x in zip(*pairs, strict=True))
    curve = kaplan_meier(value, reached)
    expected = stats.ecdf(stats.CensoredData.right_censored(value.astype(float), ~reached)).sf
    np.testing.assert_array_equal(curve["time"], expected.quantiles)
    np.testing.assert_allclose(curve["survival"], expected.probabilities, atol=1e-12)
    assert curve["events"].sum() == reached.sum() and curve["at_risk"].iloc[0] == len(value)
    below = curve["time"][curve["survival"] <= 0.5 + 1e-9]
    assert median_time(value, reached) == (below.iloc[0] if len(below) else np.inf)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_without_censoring_it_is_the_empirical_distribution(value):
    reached = np.ones(len(value), bool)
    curve = kaplan_meier(value, reached)
    share = [np.mean(np.array(value) > t) for t in curve["time"]]
    np.testing.assert_allclose(curve["survival"], share, atol=1e-12)
    assert median_time(value, reached) == sorted(value)[(len(value) - 1) // 2]


@settings(deadline=None)
@given(runs, st.integers(0, 12))
def test_a_run_never_reached_never_lowers_the_median(pairs, spent):
    value, reached = (list(x) for x in zip(*pairs, strict=True))
    assert median_time([*value, spent], [*reached, False]) >= median_time(value, reached)


def test_rounding_does_not_move_the_median():
    # the product of 23/24, 22/23, .. 12/13 comes out above 1/2 in floating point
    assert median_time(range(1, 25), [True] * 24) == 12
    assert median_time(range(1, 25), [True] * 12 + [False] * 12) == 12
    assert median_time(range(1, 25), [True] * 11 + [False] * 13) == np.inf


# --- intervals ---


def test_mean_interval_is_students():
    values = [0.2, 0.5, 0.9, 0.95]
    mean, low, high = mean_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((np.mean(values), expected.low, expected.high))
    assert high > 1 and mean_interval(values, bounds=(0, 1))[2] == 1
    one = mean_interval([0.3])
    assert one[0] == 0.3 and np.isnan(one[1:]).all()


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=9))
def test_geometric_mean_and_its_interval_turn_over_with_the_ratios(values):
    """Of b / a they are one over those of a / b, and the mean is scipy's."""
    mean, low, high = geometric_mean_interval(values)
    assert mean == pytest.approx(stats.gmean(values)) and low <= mean * (1 + 1e-12)
    assert geometric_mean_interval(1 / np.array(values)) == pytest.approx((1 / mean, 1 / high, 1 / low))


def test_the_interval_of_a_geometric_mean_by_hand():
    half = stats.t.ppf(0.975, 2) * np.log(2) / 3**0.5
    assert geometric_mean_interval([0.5, 1.0, 2.0]) == pytest.approx((1, np.exp(-half), np.exp(half)))


def test_a_ratio_of_means_has_the_bootstraps_interval():
    rng = np.random.default_rng(0)
    below = 3 + rng.normal(size=400)
    above = 0.4 * below + 0.5 * rng.normal(size=400)
    value, low, high = ratio_of_means(above, below)
    assert value == pytest.approx(above.mean() / below.mean())
    draws = stats.bootstrap(
        (above, below),
        lambda a, b, axis=-1: a.mean(axis) / b.mean(axis),
        paired=True, vectorized=True, n_resamples=4000, method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert (low, high) == pytest.approx((draws.low, draws.high), abs=0.1 * (high - low))
    assert np.isnan(ratio_of_means([1.0, 2.0], [0.0, 0.0])).all()


def test_the_interval_of_a_ratio_holds_the_true_one_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        below = rng.lognormal(0, 0.5, 100)
        _, low, high = ratio_of_means(1.3 * rng.lognormal(0, 0.5, 100), below)
        hits += low <= 1.3 <= high
    assert 0.92 <= hits / 400 <= 0.98


@pytest.mark.parametrize("n", [1, 3, 5, 8])
def test_share_interval_covers_whatever_the_share(n):
    """Exactly, by adding up the binomial probabilities of the counts whose interval holds the share."""
    bounds = [share_interval(k, n) for k in range(n + 1)]
    for p in np.linspace(0, 1, 201):
        counts = stats.binom.pmf(np.arange(n + 1), n, p)
        covered = sum(q for q, (low, high) in zip(counts, bounds, strict=True) if low <= p <= high)
        assert covered >= 0.95 - 1e-12
    for k, (low, high) in enumerate(bounds):  # not wider than that takes: each end has a tail of 2.5 %
        assert low == 0 if k == 0 else stats.binom.sf(k - 1, n, low) == pytest.approx(0.025)
        assert high == 1 if k == n else stats.binom.cdf(k, n, high) == pytest.approx(0.025)
    assert share_interval(3, 3)[0] == pytest.approx(0.025 ** (1 / 3))  # three equal seeds have a width


@pytest.mark.parametrize("learned", [0.9, 0.7, 0.5])
def test_students_interval_of_three_seeds_that_learn_or_do_not_is_too_narrow(learned):
    """Why tables show seeds and `share_interval`: accuracies near 1 or at 0.3, 95 % in name only."""
    rng, found = np.random.default_rng(0), {"student": 0, "share": 0}
    for _ in range(1000):
        good = rng.random(3) < learned
        accuracy = np.where(good, 1.0, 0.3) - 0.01 * rng.random(3)
        _, low, high = mean_interval(accuracy, bounds=(0, 1))
        found["student"] += low <= 0.3 + 0.7 * learned - 0.005 <= high
        low, high = share_interval(int(good.sum()), 3)
        found["share"] += low <= learned <= high
    assert found["share"] >= 950 - 3 * (1000 * 0.95 * 0.05) ** 0.5
    assert found["student"] < 800


@pytest.mark.parametrize("n, method", [(5, "percentile"), (40, "BCa")])
def test_bootstrap_is_scipys(n, method):
    values = np.random.default_rng(1).exponential(size=n)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method=method, random_state=np.random.default_rng(0)
    ).confidence_interval
    assert bootstrap(values) == pytest.approx((values.mean(), expected.low, expected.high))


def test_bootstrap_of_few_and_equal_values():
    assert bootstrap([0.1, 0.5, 0.9])[1:] == pytest.approx((0.1, 0.9))  # three seeds: their range
    for n in (2, 3, 30):
        estimate, low, high = bootstrap([0.7] * n)
        assert estimate == low == high == pytest.approx(0.7)
    assert bootstrap([0.7])[0] == 0.7 and np.isnan(bootstrap([0.7])[1:]).all()
    # BCa is undefined where nearly every resample has the same maximum
    estimate, low, high = bootstrap([0.0] * 11 + [1.0], statistic=np.median)
    assert estimate == 0 and low == 0 and np.isfinite(high)


def test_bootstrap_median_time_enumerated():
    value, reached = np.array([6.0, 1.0, 9.0, 2.0, 4.0]), np.array([True, True, False, True, False])
    draws = [list(draw) for draw in itertools.product(range(5), repeat=5)]
    medians = np.sort([median_time(value[draw], reached[draw]) for draw in draws])
    for confidence in (0.5, 0.8, 0.95):
        estimate, low, high = bootstrap_median_time(value, reached, confidence)
        outside = int((1 - confidence) / 2 * len(draws))
        assert estimate == 6 and (low, high) == (medians[outside], medians[-1 - outside])
    assert (low, high) == (1, np.inf)
    assert bootstrap_median_time([3, 3, 3], [True] * 3) == (3, 3, 3)
    assert bootstrap_median_time([3, 3, 3], [False] * 3) == (np.inf,) * 3
    assert np.isnan(bootstrap_median_time([3], [True])[1:]).all()


def test_a_seed_decides_the_interval_of_a_median_time():
    value = np.random.default_rng(2).exponential(size=30)
    one, again, other = (
        bootstrap_median_time(value, [True] * 30, resamples=20, seed=seed) for seed in (3, 3, 4)
    )
    assert one == again != other


def test_the_interval_of_two_resamples_has_both_as_its_ends():
    value = np.random.default_rng(2).exponential(size=30)
    both = [bootstrap_median_time(value, [True] * 30, resamples=2, seed=seed)[1:] for seed in range(5)]
    assert all(low < high and {low, high} < set(value) for low, high in both)
    low, high = bootstrap_median_time(value, [True] * 30, resamples=1)[1:]
    assert low == high


# --- pairs ---


def pairs_of(differences, **more):
    """Models a and b at seeds 0, 1, ..; a's accuracy is 0.5 higher by each difference."""
    seeds = range(len(differences))
    a = pd.DataFrame(dict(model="a", seed=seeds, accuracy=0.5 + np.array(differences), **more))
    return pd.concat([a, a.assign(model="b", accuracy=0.5)]).sample(frac=1, random_state=0)


@pytest.mark.parametrize(
    "differences",
    [
        (0.1, 0.2, 0.3, 0.4),
        (0.1, 0.2, 0.3, -0.2),
        (0.1, 0.1, -0.1, -0.1),
        (0.1, 0.2, -0.3, 0.0),
        (0.1, 0.3, -0.3, -0.1),
    ],
)
def test_sign_flips_enumerated(differences):
    flips = np.array(list(itertools.product((1, -1), repeat=4)))
    means = np.abs((flips * differences).mean(axis=1))
    p = np.mean(means >= abs(np.mean(differences)) - 1e-9)
    assert sign_flip_p(differences) == pytest.approx(p)
    test = paired_test(pairs_of(differences), "a", "b", on=["seed"])
    assert test.p == pytest.approx(p) and test.n == 4 and test.p_smallest == 2 / 16
    assert test.difference == pytest.approx(np.mean(differences))
    assert test.low <= test.difference <= test.high


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=9))
def test_paired_test_is_symmetric_and_bounded_below(differences):
    table = pairs_of(np.array(differences) / 32)
    there, back = paired_test(table, "a", "b", on=["seed"]), paired_test(table, "b", "a", on=["seed"])
    assert there.p == back.p and there.difference == -back.difference
    assert min(1, 2 / 2 ** len(differences)) <= there.p <= 1
    assert there.n > 5 or there.p > 0.05  # neither 3 nor 5 pairs can
    if any(differences):
        assert there.p_wilcoxon == stats.wilcoxon(differences).pvalue
    else:
        assert there.p == there.p_wilcoxon == 1 and there.difference == 0


def test_many_pairs_are_sampled_and_reproducible():
    differences = np.random.default_rng(0).normal(0.1, 0.2, 30)
    p = sign_flip_p(differences)
    assert p == sign_flip_p(differences)
    assert p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.02)
    # the observed signs and 10,000 random flips: p is a share of 10,001
    assert p < 1 and p * 10_001 == pytest.approx(round(p * 10_001), abs=1e-6)


def test_a_seed_decides_the_interval_of_a_paired_test():
    table = pairs_of(np.random.default_rng(1).normal(0.1, 0.2, 12))
    one, again, other = (paired_test(table, "a", "b", on=["seed"], seed=seed) for seed in (3, 3, 4))
    assert (one.low, one.high) == (again.low, again.high) != (other.low, other.high)
    usual, differences = paired_test(table, "a", "b", on=["seed"]), table[table.model == "a"].accuracy - 0.5
    assert (usual.low, usual.high) == pytest.approx(bootstrap(differences)[1:])


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 95])
def test_a_confidence_is_a_share_that_is_neither_none_nor_all(confidence):
    for interval in (
        lambda: mean_interval([1, 2], confidence),
        lambda: geometric_mean_interval([1, 2], confidence),
        lambda: ratio_of_means([1, 2], [1, 3], confidence),
        lambda: share_interval(1, 3, confidence),
        lambda: bootstrap([1.0, 2.0, 3.0], confidence=confidence),
        lambda: bootstrap_median_time([1.0, 2.0], [True, True], confidence),
    ):
        with pytest.raises(ValueError, match=f"confidence {confidence} must lie between 0 and 1"):
            interval()


def test_pairs_are_matched_on_all_columns_and_missing_values():
    table = pairs_of([0.1, 0.2, 0.3], d_state=[16.0, np.nan, 64.0])
    table = table[~((table["model"] == "b") & (table["seed"] == 2))]  # a run without a partner
    test = paired_test(table, "a", "b", on=["seed", "d_state"])
    assert test.n == 2 and test.difference == pytest.approx(0.15)


CASES = [  # (a's value, reached), (b's value, reached), who was first
    ((10, True), (20, True), "a"),
    ((30, True), (20, True), "b"),
    ((20, True), (20, True), "tie"),
    ((10, True), (20, False), "a"),
    ((20, True), (20, False), "a"),  # b had not got there after 20
    ((30, True), (20, False), "unknown"),
    ((20, False), (10, True), "b"),
    ((20, False), (20, False), "unknown"),
]


def outcomes_of(cases):
    rows = []
    for seed, (a, b, _) in enumerate(cases):
        for model, (value, reached) in zip("ab", (a, b), strict=True):
            rows.append(dict(model=model, seed=seed, value=value, reached=reached, accuracy=0.5))
    return pd.DataFrame(rows)


def test_sign_test_knows_the_order_only_where_it_is_observed():
    test = paired_sign_test(outcomes_of(CASES), "a", "b", on=["seed"])
    order = [case[2] for case in CASES]
    assert (test.a_first, test.b_first, test.ties, test.unknown) == tuple(
        order.count(x) for x in ("a", "b", "tie", "unknown")
    )
    assert test.n == 8 and test.p == pytest.approx(stats.binomtest(3, 5).pvalue)
    assert test.p_smallest == 2 / 2**5
    nobody = paired_sign_test(outcomes_of(CASES[-1:]), "a", "b", on=["seed"])
    assert nobody.p == 1 and nobody.unknown == 1


def test_holm():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])  # by hand
    np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_no_correction_and_bonferronis(p):
    corrected = holm(p)
    assert (corrected >= p).all() and (corrected <= np.minimum(1, np.array(p) * len(p))).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: require(pd.DataFrame(dict(x=[1])), ["x", "seed"], "table"), "lacks the column.s. seed"),
        (lambda: require(pd.DataFrame(dict(x=[])), ["x"], "table"), "no rows"),
        (lambda: kaplan_meier([], []), "at least one number"),
        (lambda: kaplan_meier([1, 2], [True]), "one truth value for each of the 2"),
        (lambda: kaplan_meier([-1], [True]), "smallest is -1"),
        (lambda: median_time([np.nan], [True]), "must be finite"),
        (lambda: share_interval(4, 3), "4 of 3 is no share"),
        (lambda: share_interval(0, 0), "0 of 0 is no share"),
        (lambda: bootstrap([1, np.nan]), "must be finite"),
        (lambda: mean_interval([1, None]), "must be finite"),
        (lambda: mean_interval([1, 2], confidence=95), "confidence 95"),
        (lambda: geometric_mean_interval([1, 0]), "must be positive, but the smallest is 0"),
        (lambda: ratio_of_means([1, 2], [1]), "have 2 and 1 values"),
        (lambda: paired_test(pairs_of([1.0]), "a", "z", on=["seed"]), "no rows with model z; choose from"),
        (lambda: paired_test(pairs_of([1.0]), "a", "a", on=["seed"]), "differ"),
        (lambda: paired_test(pairs_of([1.0]), "a", "b", on=["length"]), "lacks the column.s. length"),
        (lambda: paired_test(pairs_of([1.0, 1.0], n=1), "a", "b", on=["n"]), "several rows with the same n"),
        (lambda: paired_test(pairs_of([1.0, np.nan]), "a", "b", on=["seed"]), "missing accuracy"),
        (lambda: paired_test(outcomes_of(CASES), "a", "b", ["seed"], "value"), "use paired_sign_test"),
        (lambda: paired_test(pairs_of([1.0]).assign(k=[1, 2]), "a", "b", on=["k"]), "name fewer columns"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_half_is_rounded_alike_whatever_its_last_bits():
    """They depend on the order in which a sum was taken, which differs between machines."""
    written = {between(-0.025 + bits, 0.125 - bits, math.inf, 2) for bits in (-1e-16, 0.0, 1e-16, 5e-16)}
    assert len(written) == 1 and written.pop().endswith(", inf]")
    assert between(float("nan"), 0.1, 0.26, 1) == "nan [0.1, 0.3]"
