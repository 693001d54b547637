"""Turnbull's estimate and bounds of the median: a published table, another optimiser, limits, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from ssm_retrieval.statistics import kaplan_meier, median_bounds, median_interval, median_time, turnbull

NEVER = np.inf
# (lower, value, reached) of runs on a grid of evaluations; a run that never got there has spent `lower`
runs = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4), st.booleans()), min_size=1, max_size=12).map(
    lambda drawn: [np.array(x) for x in zip(*((a, a + b if r else a, r) for a, b, r in drawn), strict=True)]
)


def test_a_published_table():
    """Months to cosmetic deterioration after radiotherapy (Finkelstein and Wolfe 1985), 46 patients."""
    data = [
        (45, NEVER), (6, 10), (0, 7), (46, NEVER), (46, NEVER), (7, 16), (17, NEVER), (7, 14), (37, 44),
        (0, 8), (4, 11), (15, NEVER), (11, 15), (22, NEVER), (46, NEVER), (46, NEVER), (25, 37), (46, NEVER),
        (26, 40), (46, NEVER), (27, 34), (36, 44), (46, NEVER), (36, 48), (37, NEVER), (40, NEVER), (17, 25),
        (46, NEVER), (11, 18), (38, NEVER), (5, 12), (37, NEVER), (0, 5), (18, NEVER), (24, NEVER),
        (36, NEVER), (5, 11), (19, 35), (17, 25), (24, NEVER), (32, NEVER), (33, NEVER), (19, 26),
        (37, NEVER), (34, NEVER), (36, NEVER),
    ]  # fmt: skip
    lower, upper = np.array(data).T
    reached = np.isfinite(upper)
    found = turnbull(lower, np.where(reached, upper, lower), reached)
    ends = [(4, 5), (6, 7), (7, 8), (11, 12), (24, 25), (33, 34), (38, 40), (46, 48)]
    assert list(zip(found["lower"], found["upper"], strict=True)) == ends
    published = [0.0463, 0.0334, 0.0887, 0.0708, 0.0926, 0.0818, 0.1209, 0.4656]
    np.testing.assert_allclose(found["probability"], published, atol=6e-5)
    assert median_bounds(lower, np.where(reached, upper, lower), reached) == (38, 40)


@settings(deadline=None, max_examples=25)
@given(runs)
def test_no_other_distribution_is_likelier(drawn):
    """A general optimiser over masses of all cells of the grid finds no higher likelihood."""
    lower, value, reached = drawn
    found = turnbull(lower, value, reached)
    assert found["probability"].sum() == pytest.approx(1, abs=1e-4)
    cells = np.arange(12)  # (0, 1], (1, 2], .., and the last for never
    upper = np.where(reached, value, 12)
    inside = (lower[:, None] <= cells) & (cells < upper[:, None])
    mine = np.zeros(12)
    for _, row in found.iterrows():  # wherever in its interval the mass is
        mine[int(row["lower"])] += row["probability"]

    def negative(mass):
        return -np.log(np.maximum(inside @ mass, 1e-12)).sum()

    other = optimize.minimize(
        negative, np.full(12, 1 / 12), method="SLSQP", bounds=[(0, 1)] * 12,
        constraints=dict(type="eq", fun=lambda mass: mass.sum() - 1),
    )  # fmt: skip
    assert negative(mine) <= other.fun + 1e-3


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=12, unique_by=lambda x: x[0])
)
def test_dense_evaluations_give_kaplan_and_meier(pairs):
    value, reached = (np.array(x) for x in zip(*pairs, strict=True))
    lower = np.where(reached, value - 1e-3, value)
    found, curve = turnbull(lower, value, reached), kaplan_meier(value, reached)
    steps = curve[curve["events"] > 0]
    drops = -np.diff(steps["survival"], prepend=1)
    finite = found[np.isfinite(found["upper"])]
    np.testing.assert_allclose(finite["upper"], steps["time"])
    np.testing.assert_allclose(finite["probability"], drops, atol=1e-5)
    assert median_bounds(lower, value, reached)[1] == median_time(value, reached)


def test_by_hand():
    # two of three runs got there between 100 and 200, the third never in 1,000
    table = turnbull([100, 100, 1000], [200, 200, 1000], [True, True, False])
    assert table.to_dict("list") == dict(
        lower=[100, 1000], upper=[200, NEVER], probability=pytest.approx([2 / 3, 1 / 3])
    )
    assert median_bounds([100, 100, 1000], [200, 200, 1000], [True, True, False]) == (100, 200)
    assert median_bounds([100, 900, 1000], [200, 900, 1000], [True, False, False])[1] == NEVER
    assert median_bounds([0, 3], [4, 3], [True, False]) == (3, 4)  # a run that may have needed (3, 4], too
    # a run that never got there needs more than all it spent, not than its last evaluation
    assert turnbull([1, 2], [3, 5], [True, False])["lower"].tolist() == [1, 5]
    # overlapping intervals: both runs may have needed (2, 3]
    assert turnbull([0, 2], [3, 5], [True, True]).iloc[0].tolist() == [2, 3, 1]
    # the second begins where the first ends: they share nothing
    assert turnbull([0, 3], [3, 5], [True, True])["upper"].tolist() == [3, 5]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0.01, 1)), min_size=1, max_size=9))
def test_the_bounds_hold_the_median_that_the_grid_hides(drawn):
    """Runs with one budget, evaluated at 1, 2, .., 8; those that need more are never seen to be there."""
    need = np.array([a + b for a, b in drawn])
    reached = need <= 8
    lower, value = np.where(reached, np.ceil(need) - 1, 8), np.where(reached, np.ceil(need), 8)
    low, high = median_bounds(lower, value, reached)
    truth = np.sort(need)[(len(need) - 1) // 2]
    assert low < truth <= high and (high - low == 1 or (low, high) == (8, NEVER))


@pytest.mark.parametrize("n", range(2, 13))
def test_the_interval_of_a_median_has_the_level_that_it_says(n):
    """All orders of n exact costs against their median are enumerated: runs below it are a fair coin each."""
    value = np.arange(1.0, n + 1)
    for confidence in (0.5, 0.8, 0.95):
        low, high, level = median_interval(value, value + 0.5, [True] * n, confidence)
        d = int(low)  # the d-th smallest and the d-th largest
        assert high == n + 1 - d + 0.5
        below = stats.binom.pmf(np.arange(n + 1), n, 0.5)  # of so many runs below the median
        assert level == pytest.approx(below[d : n - d + 1].sum())
        assert level >= confidence or d == 1
        narrower = below[d + 1 : n - d].sum()
        assert narrower < confidence  # no narrower one would do


def test_the_interval_of_a_median_by_hand():
    lower, value, reached = [300, 400, 1000], [400, 500, 1000], [True, True, False]
    assert median_interval(lower, value, reached) == (300, np.inf, 0.75)
    assert median_interval(lower[:2], value[:2], reached[:2]) == (300, 500, 0.5)
    assert median_interval([300], [400], [True]) == (300, 400, 0)
    # a run that stopped early tells little from above, and its end is what it spent
    assert median_interval([10, 400, 300], [10, 500, 400], [False, True, True]) == (10, np.inf, 0.75)
    with pytest.raises(ValueError, match="confidence 95 must lie between 0 and 1"):
        median_interval(lower, value, reached, 95)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_the_interval_of_a_median_covers_it_whatever_the_grid_and_the_budget(n):
    """Costs of a wide distribution, seen every 100 steps up to a budget that a third of the runs exceed."""
    rng = np.random.default_rng(n)
    need = rng.lognormal(6, 1, (300, n))
    budget = np.exp(6 + stats.norm.ppf(2 / 3))
    reached = need <= budget - budget % 100
    value = np.where(reached, np.ceil(need / 100) * 100, budget)
    found = [
        median_interval(np.where(got, v - 100, v), v, got) for v, got in zip(value, reached, strict=True)
    ]
    low, high, level = np.array(found).T
    covered = ((low < np.exp(6)) & (np.exp(6) <= high)).mean()
    assert covered >= level[0] - 3 * (level[0] * (1 - level[0]) / 300) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], [1, 2], [True, True]), "lower must hold one number for each of the 2"),
        (([2], [2], [True]), "below value for every run that got there"),
        (([-1], [2], [True]), "at least 0"),
        (([0], [np.nan], [True]), "value must be finite"),
        (([], [], []), "at least one number"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message):
    for function in (turnbull, median_bounds, median_interval):
        with pytest.raises(ValueError, match=message) as error:
            function(*arguments)
        assert "\n" not in str(error.value)
