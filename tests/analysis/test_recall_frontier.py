"""How many facts are recalled with how many numbers: read off curves made from the law, and drawn."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from scipy import stats

from analysis.capacity_law import facts_at, recall_probability
from analysis.plots.recall_law import draw_frontier, frontier_table, recalled
from ssm_retrieval.style import family_colors

FACTS = np.array([2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])


def curve(model, D, N, seed, a=0.5, V=128, numbers=None):
    """A model that obeys the law exactly, with 10^5 answers at each number of facts."""
    p = np.ones(len(FACTS)) if N is None else recall_probability(FACTS, D, N, V, a=a)
    return pd.DataFrame(
        dict(task="position", model=model, n_layer=1, d_model=D, d_state=N, vocab_size=V, seed=seed,
             n_facts=FACTS, numbers=2 * D * N if N else numbers * FACTS, correct=1e5 * p, count=1e5)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("accuracy", "wanted"),
    [
        ([1.0, 1.0, 1.0], (16, True)),
        ([0.9, 1.0, 1.0], (0, False)),  # begins below
        # the first fall counts; halfway between the probits, halfway in log n
        ([stats.norm.cdf(1.645 + 0.5), stats.norm.cdf(1.645 - 0.5), 1.0], (4 * 2**0.5, False)),
        ([0.95, 0.95, 0.95], (16, True)),
        ([1.0, 0.95, 0.0], (8, False)),
    ],
)
def test_a_curve_is_read_where_it_first_falls(accuracy, wanted):
    assert recalled([4, 8, 16], accuracy) == (pytest.approx(wanted[0], rel=1e-3), wanted[1])
    of_table = pd.Series(accuracy, index=[7, 3, 5])  # rows of a table that was sorted
    assert recalled(pd.Series([4, 8, 16], index=[7, 3, 5]), of_table) == recalled([4, 8, 16], accuracy)


def test_facts_are_those_that_the_law_was_asked_for():
    """Interpolated between numbers a third apart, so within some percent of the law's own inverse."""
    constants = pd.DataFrame([("position", "mamba", 0.5)], columns=["task", "model", "a"])
    table = frontier_table(pd.concat([curve("mamba", 64, N, 0) for N in (2, 4)]), constants)
    expected = facts_at(64, [2, 4], 128, a=0.5)
    np.testing.assert_allclose(table["law"], expected)
    np.testing.assert_allclose(table["facts"], expected, rtol=0.02)
    assert table["numbers"].tolist() == [256, 512] and table["beyond"].tolist() == [0, 0]


def test_seeds_are_summed_up_by_their_median_and_a_growing_cache_is_counted_at_its_facts():
    good, bad = curve("mamba", 64, 4, 0), curve("mamba", 64, 4, 1, a=2.0)
    table = frontier_table(
        pd.concat([good, good.assign(seed=2), bad, curve("transformer", 64, None, 0, numbers=128)])
    )
    mamba, transformer = table.set_index("model").loc[["mamba", "transformer"]].itertuples()
    alone = [recalled(FACTS, one["correct"] / one["count"])[0] for one in (bad, good)]
    assert (mamba.low, mamba.facts, mamba.high) == pytest.approx((alone[0], alone[1], alone[1]))
    assert mamba.seeds == 3 and alone[0] < alone[1]
    assert (transformer.facts, transformer.numbers, transformer.beyond) == (64, 128 * 64, 1)
    assert np.isnan(transformer.law) and np.isnan(mamba.law)  # no constants were given


def test_the_figure_shows_every_shape_once_and_bounds_as_hollow_points():
    constants = pd.DataFrame([("position", "mamba", 0.5)], columns=["task", "model", "a"])
    parts = [curve("mamba", D, N, 0) for D in (32, 64) for N in (2, 4)]
    parts.append(curve("transformer", 32, None, 0, numbers=64))
    table = frontier_table(pd.concat(parts), constants)
    figure = draw_frontier(table)
    (ax,) = figure.axes
    drawn = {True: [], False: []}
    for bars in ax.containers:
        points = bars.lines[0]
        drawn[to_rgb(points.get_markerfacecolor()) == (1, 1, 1)] += points.get_xydata().tolist()
    for hollow, model in ((True, "transformer"), (False, "mamba")):
        mine = table.loc[table["model"] == model, ["numbers", "facts"]].to_numpy().tolist()
        assert sorted(drawn[hollow]) == sorted(mine)
    law = [line for line in ax.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 2]
    lines = np.concatenate([line.get_ydata() for line in law])
    np.testing.assert_allclose(np.sort(lines), np.sort(table["law"].dropna()))
    assert all(to_rgb(line.get_color()) == pytest.approx(to_rgb(family_colors()["mamba"])) for line in law)
    plt.close(figure)
