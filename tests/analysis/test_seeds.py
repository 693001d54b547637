"""Summaries over seeds: what may stand beside a mean, and how often seeds agree by chance."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import result_tables
from hypothesis import given
from hypothesis import strategies as st
from result_tables import run_rows
from scipy import stats

from analysis import tables, vlm_plots
from analysis.comparisons import comparisons
from analysis.plots import sweep
from ssm_retrieval.statistics import agreement, mean_interval, one_mode, summarise_seeds

# --- accuracies of seeds ---


def test_few_seeds_have_a_range_and_many_alike_an_interval():
    few = summarise_seeds([0.97, 0.31, 0.99], [True, False, True])
    assert (few.n, few.reached, few.student) == (3, 2, False)
    assert (few.mean, few.low, few.high) == (pytest.approx(0.7567, abs=1e-4), 0.31, 0.99)
    want = stats.beta.ppf([0.025, 0.975], [2, 3], [2, 1])  # Clopper and Pearson in closed form
    assert (few.share_low, few.share_high) == pytest.approx(tuple(want))
    values = np.linspace(0.8, 0.9, 29)
    many = summarise_seeds(values, values > 0.85, confidence=0.8)
    want = stats.ttest_1samp(values, 0).confidence_interval(0.8)
    assert many.student and (many.low, many.high) == pytest.approx((want.low, want.high))


def test_seeds_have_one_mode_where_a_second_would_have_shown_itself():
    assert [one_mode([0.9] * n) for n in (1, 3, 28, 29)] == [False, False, False, True]
    assert 0.9**29 <= 0.05 < 0.9**28  # a mode of one seed in ten stays unseen in 29 with less than 5 %
    spread = np.linspace(0.3, 1.0, 29)
    assert one_mode(spread)
    assert not one_mode(np.append(spread, 0.09)) and one_mode(np.append(spread, 0.11))


@pytest.mark.parametrize("n", [3, 5, 29, 60])
@pytest.mark.parametrize("learned", [0.9, 0.7, 0.5])
def test_an_interval_of_a_mean_is_given_only_where_it_holds(n, learned):
    """Accuracies of 1 or 0.3, all counts weighted by their probabilities. Student's alone would fail here."""
    truth, wrong, students, shares = 0.3 + 0.7 * learned, 0.0, 0.0, 0.0
    for k, chance in enumerate(stats.binom.pmf(np.arange(n + 1), n, learned)):
        accuracy = np.repeat([1.0, 0.3], [k, n - k])
        found = summarise_seeds(accuracy, accuracy == 1)
        wrong += chance * (found.student and not found.low <= truth <= found.high)
        _, low, high = mean_interval(accuracy, bounds=(0, 1))
        students += chance * (not low <= truth <= high)
        shares += chance * (found.share_low <= learned <= found.share_high)
    assert wrong <= 0.05 and shares >= 0.95 - 1e-12
    assert n > 5 or students > 0.05


def test_words_about_seeds():
    assert (
        tables.seeds([0.97, 0.31, 0.99], [True, False, True]) == "2 of 3 [0.09, 0.99]; 0.757 (0.310 to 0.990)"
    )
    assert tables.seeds([0.97], [True]) == "1 of 1 [0.03, 1.00]; 0.970"
    values = np.tile([0.8, 0.9], 20)
    mean, low, high = mean_interval(values)
    assert tables.seeds(values, values > 1) == f"0 of 40 [0.00, 0.09]; {mean:.3f} [{low:.3f}, {high:.3f}]"


def test_figures_of_vlms_have_no_students_interval_of_three_seeds():
    values = [0.1, 0.8, 0.9]
    results = pd.DataFrame(dict(task="grounding", seed=[0, 1, 2], value=values))
    row = vlm_plots.over_seeds(results, ["task"], (0, 1)).iloc[0]
    assert (row["mean"], row["low"], row["high"], row["interval"]) == (pytest.approx(0.6), 0.1, 0.9, "range")
    one = vlm_plots.over_seeds(results.iloc[:1], ["task"], (0, 1)).iloc[0]
    assert one["mean"] == 0.1 and np.isnan([one["low"], one["high"]]).all()
    many = pd.DataFrame(dict(task="grounding", seed=range(40), value=np.tile([0.8, 0.9], 20)))
    row = vlm_plots.over_seeds(many, ["task"], (0, 1)).iloc[0]
    assert (row["mean"], row["low"], row["high"]) == pytest.approx(mean_interval(many["value"]))
    assert row["interval"] == "Student"


# --- costs ---


def outcomes(*rows):
    return pd.DataFrame(rows, columns=["lower", "value", "reached"])


def test_words_about_costs():
    two = outcomes((3000, 4000, True), (4000, 5000, True), (9000, 9000, False))
    assert tables.cost(two) == "4,000 to 5,000 [3,000, ∞] 75 %"
    assert tables.cost(two.iloc[1:]) == "4,000 to 5,000 [4,000, ∞] 50 %"  # the lower median
    assert tables.cost(two.iloc[:1]) == "3,000 to 4,000"
    assert tables.cost(two.iloc[2:]) == "> 9,000"


def test_a_figure_shows_between_which_evaluations_a_cost_lies():
    """Evaluated every 1,000 sequences: passed at 2,000, at the first one, and never."""
    runs = [run_rows("mamba", 16, seed, curve) for seed, curve in enumerate(([0.1, 1.0], [1.0], [0.1, 0.2]))]
    table = sweep.threshold_table(result_tables.tables(runs)[0])
    assert sorted(zip(table["lower"], table["value"], strict=True)) == [(0, 1000), (1000, 2000), (2000, 2000)]
    (ax,) = sweep.cost_vs_length(table).axes
    spans = [path.vertices[:, 1] for lines in ax.collections for path in lines.get_paths()]
    np.testing.assert_allclose(spans, [[1000, 2000]])  # the first evaluation has none before
    plt.close(ax.figure)


# --- seeds that agree ---


@pytest.mark.parametrize(("seeds", "count"), [(1, 5), (2, 3), (3, 2)])
def test_coins_enumerated(seeds, count):
    """All signs of all comparisons: the mean number that agree is `expected`."""
    found = [
        agreement(np.reshape(signs, (count, seeds)))
        for signs in itertools.product((-1, 1), repeat=seeds * count)
    ]
    assert np.mean([one.same for one in found]) == pytest.approx(found[0].expected)
    assert {one.comparisons for one in found} == {count}
    largest = stats.binomtest(seeds, seeds).pvalue  # all seeds on one side
    assert found[0].p_smallest == pytest.approx(largest)


@given(st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=5), min_size=1, max_size=6))
def test_agreement_does_not_depend_on_which_side_is_subtracted(differences):
    there, back = agreement(differences), agreement([[-x for x in one] for one in differences])
    assert there == back and there.same <= there.comparisons >= there.expected
    assert there.seeds == min(map(len, differences))


def test_no_difference_agrees_with_nothing():
    assert agreement([[0.0, 0.0], [0.1, 0.0], [0.1, 0.2], [-0.1, -0.2]]).same == 2


def test_words_about_agreement():
    text = tables.agreed([[1, 2, 3], [-1, 2, 3], [-1, -2, -1]] * 4, "gaps are shown")
    assert text.startswith(
        "12 gaps are shown. 8 of them have the same sign in all 3 seeds; coins would give 3"
    )
    assert text.endswith("no single comparison of 3 seeds can have p below 1/4.")


def test_tests_of_a_sweep_count_themselves():
    """Three variants in one setting: three pairs of three seeds, one of which is undecided."""
    spent = {"a": (1, 1, 1), "b": (2, 2, 2), "c": (2, 2, 3)}
    rows = [
        dict(variant=name, setting="suffix, dense", seq_len=8, seed=seed, value=value, reached=True)
        for name, values in spent.items()
        for seed, value in enumerate(values)
    ]
    found = comparisons(pd.DataFrame(rows)).set_index(["a", "b"])
    assert set(found["comparisons"]) == {3} and found.loc[("a", "b"), "a_first"] == 3
    # coins: 1/4 for a and b, 1/4 for a and c; of b and c only one pair is decided, which agrees with itself
    assert set(found["by_chance"]) == {0.25 + 0.25 + 1}
    assert found.loc[("a", "b"), "p_holm"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: summarise_seeds([], []), "at least one number"),
        (lambda: summarise_seeds([0.1, 0.2], [True]), "one truth value for each of the 2 accuracies"),
        (lambda: summarise_seeds([0.1, 0.2], [True, 2]), "one truth value"),
        (lambda: summarise_seeds([0.1], [True], confidence=95), "confidence 95"),
        (lambda: one_mode([np.nan]), "accuracy must be finite"),
        (lambda: agreement([]), "holds no comparison"),
        (lambda: agreement([[0.1], []]), "differences must be a list of at least one number"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_only_what_was_run_has_a_panel():
    """Four cells of the six that two settings and three lengths would make; each panel says which it is."""
    runs = [
        run_rows("mamba", seq_len, 0, [0.2, 0.9], layout=layout)
        for layout, seq_len in (("suffix", 16), ("suffix", 32), ("suffix", 64), ("prefix", 64))
    ]
    evaluations, _ = result_tables.tables(runs)
    figure = sweep.accuracy_curves(sweep.accuracy_table(evaluations))
    shown = [ax for ax in figure.axes if ax.get_visible()]
    titles = [ax.get_title() for ax in shown]
    assert len(titles) == len(set(titles)) == 4
    assert sorted(title.split("length ")[1] for title in titles) == ["16", "32", "64", "64"]
    for ax in shown:
        assert len(ax.lines) >= 3  # a run, the mean, chance
        assert {tuple(line.get_ydata()) for line in ax.lines} >= {(0.2, 0.9)}
