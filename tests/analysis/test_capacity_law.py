"""The recall scaling law against published numbers, a simulated memory and simulated answers; its figure."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from scipy import stats

from analysis.capacity_law import (
    CELL,
    CONSTANTS,
    facts_at,
    fit_constant,
    fit_constants,
    load,
    recall_at_load,
    recall_probability,
    typical_maximum,
)
from analysis.plots.recall_law import collapse_table, draw_collapse
from ssm_retrieval.style import family_colors

LINEAR, MAMBA = CONSTANTS["linear", "mqar"], CONSTANTS["mamba", "ar"]
sizes = dict(
    n_facts=st.integers(1, 2000),
    d_model=st.integers(8, 4096),
    d_state=st.integers(1, 256),
    vocab_size=st.integers(2, 100_000),
    n_layer=st.integers(1, 64),
    a=st.floats(0.1, 4),
)


# --- the law ---


@pytest.mark.parametrize(
    ("d_model", "vocab_size", "facts"),
    [
        (32, 128, {1: 1.8, 2: 3.6, 4: 7.2, 8: 14, 16: 29}),
        (64, 128, {1: 5.6, 2: 11, 4: 22, 8: 45}),
        (64, 512, {1: 4, 2: 8, 4: 17, 8: 33, 16: 67}),
        (128, 512, {4: 41, 16: 165, 64: 660}),
        (256, 2048, {16: 300, 64: 1200}),
    ],
)
def test_facts_that_mamba_holds_were_computed_before(d_model, vocab_size, facts):
    """At 0.95, one query, one layer; by hand from the published formula, rounded to two or three digits."""
    found = facts_at(d_model, list(facts), vocab_size, a=MAMBA)
    np.testing.assert_allclose(found, list(facts.values()), rtol=0.02, atol=0.5)


def test_a_constant_of_many_queries():
    assert facts_at(128, 16, 512, a=LINEAR) == pytest.approx(66, abs=0.5)
    assert facts_at(128, 16, 512, a=CONSTANTS["mamba", "mqar"]) == pytest.approx(132, abs=0.5)


def test_trained_linear_models_are_within_a_tenth():
    """Accuracies from the README of github.com/yuvalko1/mamba-recall-scaling-laws: 16 pairs, 512 tokens."""
    measured = {
        16: (0.24, 0.32, np.nan, np.nan),  # the authors leave out N > D
        32: (0.64, 0.89, 0.94, 0.95),
        48: (0.82, 0.98, 1.0, 1.0),
        64: (0.89, 1.0, 1.0, 1.0),
    }
    D, N = np.array(list(measured))[:, None], np.array([8, 16, 24, 32])
    off = recall_probability(16, D, N, 512, a=LINEAR) - np.array(list(measured.values()))
    assert np.nanmax(np.abs(off)) < 0.105
    wrong = recall_probability(16, D, N, 512, a=MAMBA) - np.array(list(measured.values()))
    assert np.nanmax(np.abs(wrong)) > 0.2  # the constant matters


def test_a_memory_of_random_hashes_obeys_the_law():
    """sum_i v_i k_i^T with random unit codes, read with a key and decoded among all values: a = 1.

    The law is an approximation: values of other facts in the context compete harder than it assumes.
    """

    def codes(*shape):
        drawn = rng.normal(size=shape)
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    V, trials, rng = 512, 300, np.random.default_rng(0)
    cells = np.array([(16, 64, 8), (40, 64, 16), (100, 32, 32), (200, 64, 32)])
    right = np.zeros(len(cells))
    for cell, (n_facts, d_model, d_state) in enumerate(cells):
        for trial in range(trials):
            if trial % 30 == 0:
                values = codes(V, d_model)
            keys, told = codes(n_facts, d_state), rng.choice(V, n_facts, replace=False)
            state = values[told].T @ keys
            right[cell] += (values @ (state @ keys[0])).argmax() == told[0]
    off = {a: np.abs(right / trials - recall_probability(*cells.T, V, a=a)) for a in (0.5, 1.0, 2.0)}
    assert off[1.0].max() < 0.12
    assert off[1.0].mean() < 0.4 * min(off[0.5].mean(), off[2.0].mean())


@pytest.mark.parametrize("V", [100, 1000, 100_000])
def test_one_of_V_normal_numbers_exceeds_their_typical_maximum(V):
    assert V * stats.norm.sf(typical_maximum(V)) == pytest.approx(1, abs=0.12)


@given(**sizes)
def test_facts_at_is_the_inverse(n_facts, d_model, d_state, vocab_size, n_layer, a):
    p = recall_probability(n_facts, d_model, d_state, vocab_size, n_layer, a)
    if 1e-4 < p < 1 - 1e-9:
        back = facts_at(d_model, d_state, vocab_size, n_layer, a, p)
        assert back == pytest.approx(n_facts, rel=1e-4)


@given(**sizes)
def test_every_argument_moves_recall_one_way(**given_sizes):
    p = recall_probability(**given_sizes)
    for name, sign in dict(n_facts=-1, d_model=1, d_state=1, vocab_size=-1, n_layer=1, a=-1).items():
        more = recall_probability(**given_sizes | {name: 2 * given_sizes[name]})
        assert sign * (more - p) >= 0
        if 1e-6 < p < 1 - 1e-6 and name not in ("d_state", "n_layer", "n_facts", "a"):
            assert more != p  # the others may be nothing beside 1 / D


def test_limits():
    assert recall_probability(1, 1e6, 1, 512) == pytest.approx(1)
    only_width = stats.norm.cdf(16**0.5 - typical_maximum(512))  # no crowding by facts: 1 / D is left
    assert recall_probability(100, 16, 1e12, 512) == pytest.approx(only_width)
    assert recall_probability(100, 16, 4, 512, a=0) == pytest.approx(only_width)
    assert recall_probability(1e12, 64, 16, 512) == pytest.approx(1 / 512, rel=0.5)  # chance, about
    assert recall_probability(1, 64, 16, 512, a=np.inf) == pytest.approx(1 / 512, rel=0.5)
    assert facts_at(16, 4, 512, p=0.95) == 0  # 16 dimensions do not hold 512 tokens apart
    assert facts_at(16, 4, 512, p=1e-4) == facts_at(16, 4, 512, p=0.5, a=0) == np.inf


def test_layers_times_states_is_one_large_state_and_curves_collapse():
    assert recall_probability(40, 64, 4, 512, n_layer=8) == recall_probability(40, 64, 32, 512)
    np.testing.assert_allclose(load([10, 20], 64, [4, 16], [1, 2]), [10 / 256, 20 / 2048])
    same = recall_probability([10, 40, 20], 64, [4, 16, 4], 512, [1, 1, 2])
    np.testing.assert_allclose(same, recall_at_load(10 / 256, 64, 512))


# --- its constant ---


def simulated(a, seeds=5, between=0.0, lapse=0.0, count=200, seed=0, V=128):
    """Answers that follow the law with a * exp(N(0, between^2)) for each seed."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid([4, 16, 64], [16, 32, 64], [4, 16]), axis=-1).reshape(-1, 3)
    parts = []
    for number in range(seeds):
        cells = pd.DataFrame(grid, columns=CELL[:3]).assign(n_layer=1, vocab_size=V, seed=number, count=count)
        law = recall_probability(*grid.T, V, a=a * np.exp(between * rng.normal()))
        parts.append(cells.assign(correct=rng.binomial(count, (1 - lapse) * law)))
    return pd.concat(parts, ignore_index=True)


def test_the_estimate_is_the_most_likely_constant():
    answers = simulated(0.625)
    grid = np.linspace(0.55, 0.7, 1501)
    laws = recall_probability(*(answers[name].to_numpy()[:, None] for name in CELL), grid)
    chances = stats.binom.logpmf(answers["correct"].to_numpy()[:, None], 200, laws).sum(axis=0)
    found = fit_constant(answers)
    assert found.a == pytest.approx(grid[chances.argmax()], abs=2e-4)
    assert found.lapse == pytest.approx(0, abs=1e-3)
    assert found.low < 0.625 < found.high and found.high / found.low < 1.2
    assert 0.7 < found.dispersion < 1.3 and found.rmse < 0.02
    assert (found.seeds, found.observations) == (5, len(answers))


@pytest.mark.parametrize("lapse", [0.01, 0.03])
def test_slips_of_the_trained_model_do_not_move_the_constant(lapse):
    found = fit_constant(simulated(0.5, lapse=lapse, count=1000))
    assert found.a == pytest.approx(0.5, rel=0.05) and found.low < 0.5 < found.high
    assert found.lapse == pytest.approx(lapse, abs=0.005)


def test_the_interval_knows_that_the_share_of_lapses_is_a_guess_too():
    """Of many seeds that do not differ it is the profile likelihood's, here from all pairs of a grid."""
    answers = simulated(0.5, seeds=30, lapse=0.1, count=60)
    answers = answers[(answers["d_model"] > 16) & (answers["n_facts"] == 64)]  # none that lapses alone spoil
    sums = answers.groupby(CELL, as_index=False)[["correct", "count"]].sum()
    grid, lapses = np.geomspace(0.3, 0.8, 400), np.linspace(0, 0.4, 201)
    laws = recall_probability(*(sums[name].to_numpy()[:, None, None] for name in CELL), grid[:, None])
    right, count = (sums[name].to_numpy()[:, None, None] for name in ("correct", "count"))
    chances = stats.binom.logpmf(right, count, (1 - lapses) * laws).sum(axis=0)
    profile = chances.max(axis=1)
    kept = grid[2 * (profile.max() - profile) < stats.chi2.ppf(0.95, 1)]
    known = chances[:, np.unravel_index(chances.argmax(), chances.shape)[1]]
    narrow = grid[2 * (known.max() - known) < stats.chi2.ppf(0.95, 1)]
    found = fit_constant(answers)
    width = np.log(kept[-1] / kept[0])
    assert np.log(found.high / found.low) == pytest.approx(width, rel=0.25)
    assert width > 1.3 * np.log(narrow[-1] / narrow[0])


def test_seeds_that_differ_widen_the_interval():
    widths = []
    for between in (0.0, 0.2, 0.6):
        found = fit_constant(simulated(0.5, between=between))
        widths.append(np.log(found.high / found.low))
    assert widths[0] < widths[1] / 2 < widths[2] / 4
    doubled = pd.concat([simulated(0.5, between=0.6)] * 2)  # the same seeds' answers twice: no new seed
    assert np.log(np.divide(*[getattr(fit_constant(doubled), end) for end in ("high", "low")])) == (
        pytest.approx(widths[2], rel=0.05)
    )


def test_more_confidence_is_a_wider_interval_and_one_seed_has_none():
    answers = simulated(0.5, between=0.2)
    half, most = fit_constant(answers, 0.5), fit_constant(answers, 0.99)
    assert most.low < half.low < half.a == most.a < half.high < most.high
    alone = fit_constant(answers[answers["seed"] == 0])
    assert alone.seeds == 1 and np.isnan([alone.low, alone.high]).all() and 0.2 < alone.a < 1.2


def test_answers_that_are_all_right_give_an_upper_bound():
    answers = simulated(0.5)
    answers = answers[answers["d_model"] == 64].assign(correct=200)
    found = fit_constant(answers)
    assert found.a == found.low == 0 and 0 < found.high < 0.1
    allowed = recall_probability(*(answers[name] for name in CELL), found.high)
    assert 1e-4 < 1 - allowed.min() < 0.05  # what 1000 right answers in the fullest cell allow


def test_answers_that_are_all_wrong_give_no_upper_bound():
    found = fit_constant(simulated(0.5).assign(correct=0))
    assert found.a == found.high == np.inf


def test_the_misfit_is_that_of_cells_not_of_seeds():
    answers = simulated(0.5, count=100_000)
    good = fit_constant(answers)
    assert good.rmse < 0.002
    bad = (answers["n_facts"] == 64) & (answers["d_model"] == 64) & (answers["d_state"] == 4)
    answers.loc[bad, "correct"] -= 20_000
    found = fit_constant(answers)
    assert found.worst < -0.1 and found.rmse > 0.02 and found.dispersion > 50 * good.dispersion
    assert abs(found.worst) >= found.rmse


def test_constants_by_group():
    both = pd.concat([simulated(0.5).assign(model="mamba"), simulated(2.0, seed=1).assign(model="mamba2")])
    table = fit_constants(both).set_index("model")
    assert table.loc["mamba", "a"] == fit_constant(simulated(0.5)).a
    assert table.loc["mamba2", "low"] < 2 < table.loc["mamba2", "high"]


@pytest.mark.slow
@pytest.mark.parametrize(("between", "lapse", "most"), [(0.0, 0.0, 1.0), (0.3, 0.0, 0.98), (0.1, 0.02, 0.98)])
def test_the_interval_holds_the_constant_as_often_as_it_says(between, lapse, most):
    """0.95 within three standard errors; without differences between seeds it is cautious."""
    hits = 0
    for trial in range(200):
        found = fit_constant(simulated(0.5, between=between, lapse=lapse, seed=trial))
        hits += found.low <= 0.5 <= found.high
    assert 0.95 - 3 * (0.95 * 0.05 / 200) ** 0.5 <= hits / 200 <= most


# --- the figure ---


@pytest.fixture(scope="module")
def observations():
    parts = [
        simulated(a, between=0.2, V=V).assign(model=model)
        for model, a in (("mamba", 0.5), ("hybrid", 0.1))
        for V in (128, 512)
    ]
    return pd.concat(parts, ignore_index=True)


def test_a_point_pools_the_seeds_of_a_cell(observations):
    table = collapse_table(observations)
    assert len(table) == 2 * 2 * 18
    row = table.iloc[7]
    cell = observations[(observations[["model", *CELL]] == row[["model", *CELL]]).all(axis=1)]
    shares = cell["correct"] / cell["count"]
    assert (row["accuracy"], row["low"], row["high"]) == pytest.approx(
        (shares.mean(), shares.min(), shares.max())
    )
    assert row["seeds"] == 5 and row["chance"] == 1 / row["vocab_size"]
    assert row["load"] == pytest.approx(row["n_facts"] / (row["d_model"] * row["d_state"]))
    a = table.groupby("model")["a"].unique()
    assert a["mamba"] == pytest.approx([0.5], rel=0.4) and a["hybrid"] == pytest.approx([0.1], rel=0.4)
    assert (table["law"] - table["accuracy"]).abs().max() < 0.15


def test_the_figure_shows_points_law_and_chance_in_the_family_s_colour(observations):
    table = collapse_table(observations)
    figure = draw_collapse(table)
    axes = np.array(figure.axes).reshape(2, 2)  # vocabularies, families
    for (i, j), ax in np.ndenumerate(axes):
        model, V = ("mamba", "hybrid")[j], (128, 512)[i]
        mine = table[(table["model"] == model) & (table["vocab_size"] == V)]
        curves = [line for line in ax.lines if len(line.get_xdata()) == 200]
        for D, line in zip((16, 32, 64), curves, strict=True):
            fit = mine[mine["d_model"] == D].iloc[0]
            law = (1 - fit["lapse"]) * recall_at_load(line.get_xdata(), D, V, fit["a"])
            np.testing.assert_allclose(line.get_ydata(), law)
            assert to_rgb(line.get_color()) == pytest.approx(to_rgb(family_colors()[model]))
        points = [bars.lines[0].get_xydata() for bars in ax.containers]
        expected = mine.sort_values(["d_model", "load", "accuracy"])[["load", "accuracy"]].to_numpy()
        found = np.concatenate([part[np.lexsort(part.T[::-1])] for part in points])
        np.testing.assert_allclose(found, expected)
        assert [line.get_ydata()[0] for line in ax.lines if len(line.get_xdata()) == 2][-1] == 1 / V
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {"D = 16", "law", "chance"}
    plt.close(figure)


# --- bad input ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recall_probability(0, 64, 16, 512), "n_facts must be positive and finite, but holds 0"),
        (lambda: recall_probability(4, np.nan, 16, 512), "d_model must be positive"),
        (lambda: load([4, np.inf], 64, 16), "n_facts must be positive and finite, but holds inf"),
        (lambda: recall_probability(4, 64, 16, 1), "vocab_size 1 must be at least 2"),
        (lambda: recall_probability(4, 64, 16, 512, a=-1), "a -1 must be at least 0"),
        (lambda: facts_at(64, 16, 512, p=95), "p 95 must lie between 0 and 1"),
        (lambda: facts_at(64, -16, 512), "d_state must be positive and finite, but holds -16"),
        (lambda: fit_constant(simulated(1.0), 95), "confidence 95"),
        (lambda: fit_constant(simulated(1.0).drop(columns="seed")), "lacks the column.s. seed"),
        (lambda: fit_constant(simulated(1.0).assign(correct=201)), "0 <= correct <= count"),
        (lambda: fit_constant(simulated(1.0).assign(seed=np.nan)), "name the seed of every row"),
        (lambda: fit_constant(simulated(1.0).iloc[:0]), "observations has no rows"),
        (lambda: fit_constants(simulated(1.0)), "lacks the column.s. model"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
