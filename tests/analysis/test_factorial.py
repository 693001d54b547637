"""Effects of full factorials against closed forms, least squares, Welch's interval and known truths."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ssm_retrieval.statistics import factorial_effects, factorial_shares

DESIGN = {"conv": ("default", "identity", "none"), "position": ("none", "learned"), "tied": (False, True)}
SQUARE = {"a": (0, 1), "b": (0, 1)}


def design(factors, outcome, seeds=1):
    """A table with `seeds` runs in each cell, of value outcome(cell, seed) that all got there."""
    rows = [
        dict(zip(factors, cell, strict=True)) | dict(value=outcome(cell, seed), reached=True)
        for cell in itertools.product(*factors.values())
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def effects(table, factors, **more):
    return factorial_effects(table, factors, resamples=200, **more).set_index(["term", "contrast"])


def test_an_additive_model_has_its_own_effects_and_no_interaction():
    part = [
        {"default": 1.0, "identity": -2.5, "none": 0.25},
        {"none": 0.0, "learned": 4.0},
        {False: 3, True: 1},
    ]
    found = effects(
        design(DESIGN, lambda cell, _: sum(p[c] for p, c in zip(part, cell, strict=True)), 2), DESIGN
    )
    main = found[~found.index.get_level_values("term").str.contains(" x ")]["effect"]
    assert main.to_dict() == pytest.approx(
        {
            ("conv", "identity - default"): -3.5,
            ("conv", "none - default"): -0.75,
            ("position", "learned - none"): 4.0,
            ("tied", "True - False"): -2.0,
        }
    )
    others = found.drop(main.index)
    assert len(others) == 2 * 1 + 2 * 1 + 1 * 1 and others["effect"].abs().max() < 1e-12
    assert (found["comparisons"] == 9).all() and found["runs"].max() == 24
    np.testing.assert_allclose(found[["low", "high"]].to_numpy(), found[["effect"]] @ [[1, 1]], atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(-9, 9), min_size=4, max_size=4))
def test_the_interaction_of_two_by_two_is_the_difference_of_differences(cells):
    table = design(SQUARE, lambda cell, seed: cells[2 * cell[0] + cell[1]] + (seed - 1), seeds=3)
    m00, m01, m10, m11 = cells
    assert effects(table, SQUARE)["effect"].tolist() == pytest.approx(
        [(m10 + m11 - m00 - m01) / 2, (m01 + m11 - m00 - m10) / 2, (m11 - m01) - (m10 - m00)]
    )


def test_effects_are_least_squares_coefficients():
    """Of the saturated model with codes -1 and 1: an effect is twice, an interaction four times its own."""
    factors = {name: (0, 1) for name in "abc"}
    table = design(factors, lambda cell, seed: np.sin(1 + cell[0] + 3 * cell[1] + 7 * cell[2] + 11 * seed), 2)
    code = [(-1) ** (1 - table[name].to_numpy()) for name in factors]
    columns = {name: c for name, c in zip(factors, code, strict=True)}
    columns |= {f"{a} x {b}": columns[a] * columns[b] for a, b in itertools.combinations(factors, 2)}
    x = np.column_stack([*columns.values(), np.ones(len(table)), code[0] * code[1] * code[2]])
    fit = dict(zip(columns, np.linalg.lstsq(x, table["value"].to_numpy(), rcond=None)[0], strict=False))
    found = factorial_effects(table, factors, resamples=50).set_index("term")["effect"]
    assert found.to_dict() == pytest.approx({k: v * (4 if " x " in k else 2) for k, v in fit.items()})


def test_a_cell_counts_once_however_many_seeds_it_has():
    table = design({"a": (0, 1)}, lambda cell, _: 10.0 * cell[0])
    more = pd.concat([table, *[table[table["a"] == 1]] * 4])
    assert effects(more, {"a": (0, 1)})["effect"].item() == 10
    unbalanced = pd.concat([design(SQUARE, lambda cell, _: 1.0 * (cell == (1, 1))), pd.DataFrame(
        dict(a=1, b=0, value=[0.0] * 9, reached=True))])  # fmt: skip
    assert effects(unbalanced, SQUARE)["effect"].tolist() == pytest.approx([0.5, 0.5, 1])


# --- runs that never got there, and evaluations ---


def test_what_a_run_never_got_to_bounds_an_effect_on_its_side():
    table = design(SQUARE, lambda cell, seed: 5.0 + cell[0] + seed, seeds=2)
    slow = table.assign(reached=~((table["a"] == 1) & (table["b"] == 1) & (table["value"] == 7)))
    found = effects(slow, SQUARE)
    assert found["censored"].tolist() == [1, 1, 1]
    assert found["effect"].tolist() == effects(table, SQUARE)["effect"].tolist() == [1, 0, 0]
    assert found["least"].tolist() == [1, 0, 0] and (found["most"] == np.inf).all()  # lower bounds
    fast = table.assign(reached=~((table["a"] == 0) & (table["b"] == 0) & (table["value"] == 6)))
    found = effects(fast, SQUARE)
    assert found["least"].tolist() == [-np.inf, -np.inf, 0] and found["most"].tolist() == [1, 0, np.inf]
    nobody = effects(table.assign(reached=False), SQUARE)
    assert (nobody["least"] == -np.inf).all() and (nobody["most"] == np.inf).all()


def test_a_grid_of_evaluations_bounds_an_effect():
    """Whatever the costs are between two evaluations: their effects lie between least and most."""
    rng = np.random.default_rng(0)
    table = design(DESIGN, lambda cell, _: float(rng.integers(2, 9)), seeds=3)
    table["before"] = table["value"] - rng.integers(1, 3, len(table))
    found = effects(table, DESIGN, lower="before")
    for _ in range(5):
        true = table.assign(value=rng.uniform(table["before"], table["value"]))
        effect = effects(true, DESIGN)["effect"]
        assert (found["least"] <= effect).all() and (effect <= found["most"]).all()
    width = found["most"] - found["least"]
    assert (width > 0).all() and (effects(table, DESIGN)[["least", "most"]].std(axis=1) == 0).all()
    first = table.assign(before=np.where(table["tied"], -np.inf, table["before"]))  # no evaluation before
    assert effects(first, DESIGN, lower="before").loc[("tied", "True - False"), "least"] == -np.inf


# --- intervals ---


def test_the_interval_of_two_groups_is_welchs():
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 1, 9), rng.normal(2, 3, 14)
    table = pd.DataFrame(dict(a=np.repeat([0, 1], [9, 14]), value=np.append(a, b), reached=True))
    for confidence in (0.8, 0.95):
        row = factorial_effects(table, {"a": (0, 1)}, confidence=confidence).iloc[0]
        want = stats.ttest_ind(b, a, equal_var=False).confidence_interval(confidence)
        width = want.high - want.low
        assert (row["low"], row["high"]) == pytest.approx((want.low, want.high), abs=0.04 * width)
        assert (row["low_all"], row["high_all"]) == (row["low"], row["high"])  # a single comparison


def test_few_seeds_of_one_cell_decide_how_wide_an_interval_is():
    """6 and 60 normal quantiles of equal scatter: Welch has 6 degrees of freedom, not the 64 of all runs."""
    a, b = (stats.norm.ppf((np.arange(n) + 0.5) / n) for n in (6, 60))
    table = pd.DataFrame(dict(a=np.repeat([0, 1], [6, 60]), value=np.append(a / a.std(), b), reached=True))
    row = factorial_effects(table, {"a": (0, 1)}).iloc[0]
    want = stats.ttest_ind(b, a / a.std(), equal_var=False)
    assert want.df == pytest.approx(6, abs=0.3)
    width = np.ptp(want.confidence_interval(0.95))
    assert row["high"] - row["low"] == pytest.approx(width, rel=0.06)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Skewed outcomes of three seeds a cell, 40 designs of three effects each."""
    rng = np.random.default_rng(0)
    truth, one, every = np.array([2.25, 1.25, 0.5]), [], []
    for _ in range(40):
        table = design(SQUARE, lambda c, _: 2 * c[0] + c[1] + 0.5 * c[0] * c[1] + rng.exponential(), seeds=3)
        found = factorial_effects(table, SQUARE, resamples=200)
        one += ((found["low"] <= truth) & (truth <= found["high"])).tolist()
        every.append(((found["low_all"] <= truth) & (truth <= found["high_all"])).all())
    assert np.mean(one) >= 0.95 - 3 * (0.95 * 0.05 / len(one)) ** 0.5
    assert np.mean(every) >= 0.95 - 3 * (0.95 * 0.05 / len(every)) ** 0.5
    assert np.mean(one) < 1  # an interval that always holds would be too wide


def test_a_seed_decides_the_bootstrap_and_one_run_has_no_interval():
    rng = np.random.default_rng(0)
    table = design(SQUARE, lambda *_: rng.normal(), seeds=4)
    one, again, other = (factorial_effects(table, SQUARE, resamples=50, seed=s) for s in (3, 3, 4))
    pd.testing.assert_frame_equal(one, again)
    assert not one["low"].equals(other["low"]) and one["effect"].equals(other["effect"])
    single = pd.concat(
        [table[(table["a"] != 1) | (table["b"] != 1)], table[table["a"] * table["b"] == 1][:1]]
    )
    assert factorial_effects(single, SQUARE)[["low", "high", "low_all", "high_all"]].isna().all(axis=None)


# --- shares ---


def shares(counts, n):
    """a, b and reached of n runs in each of the four cells, of which counts[cell] got there."""
    cells = itertools.product((0, 1), (0, 1))
    rows = [dict(a=a, b=b, reached=i < k) for (a, b), k in zip(cells, counts, strict=True) for i in range(n)]
    return pd.DataFrame(rows)


def test_shares_of_two_groups_have_agresti_and_caffos_interval():
    table = shares([1, 1, 4, 4], 5)
    table = table[table["b"] == 0]
    row = factorial_shares(table, {"a": (0, 1)}).iloc[0]
    p, q, n = 2 / 7, 5 / 7, 7  # one success and one failure more in each group
    half = stats.norm.ppf(0.975) * (p * (1 - p) / n + q * (1 - q) / n) ** 0.5
    assert row["effect"] == pytest.approx(0.6)
    assert (row["low"], row["high"]) == pytest.approx((q - p - half, q - p + half))


def test_shares_of_cells_that_agree_have_a_width():
    found = factorial_shares(shares([0, 0, 0, 5], 5), SQUARE).set_index("term")
    assert found["effect"].to_dict() == dict(a=0.5, b=0.5) | {"a x b": 1}
    assert (found["high"] - found["low"] > 0.3).all() and (found["runs"] == 20).all()
    assert (found["low_all"] < found["low"]).all() and (found["high_all"] > found["high"]).all()
    third = factorial_shares(shares([0, 0, 0, 5], 5), SQUARE, confidence=1 - 0.05 / 3)
    assert found["low_all"].tolist() == pytest.approx(third["low"].tolist())  # Bonferroni over three


def test_intervals_of_shares_hold_the_truth_exactly_enumerated():
    """All outcomes of five runs in each of two cells, weighted by their binomial probabilities."""
    pairs, found = list(itertools.product(range(6), repeat=2)), []
    for k in pairs:
        table = pd.concat(
            [shares([one] * 4, 5).query("a == 0 and b == 0").assign(a=a) for a, one in enumerate(k)]
        )
        found.append(factorial_shares(table, {"a": (0, 1)}).iloc[0])
    for p, q in ((0.1, 0.7), (0.5, 0.5), (0.02, 0.98)):
        covered = sum(
            stats.binom.pmf(i, 5, p) * stats.binom.pmf(j, 5, q) * (row["low"] <= q - p <= row["high"])
            for (i, j), row in zip(pairs, found, strict=True)
        )
        assert covered >= 0.93


@pytest.mark.parametrize(
    ("change", "factors", "message"),
    [
        (lambda t: t[(t["a"] == 0) | (t["b"] == 0)], SQUARE, "no run with a 1, b 1; a full factorial needs"),
        (lambda t: t, {"a": (0, 1, 2), "b": (0, 1)}, "no run with a 2, b 0"),
        (lambda t: t, {"a": (0,), "b": (0, 1)}, "factor a needs two different levels or more"),
        (lambda t: t, {"a": (0, 1, 1), "b": (0, 1)}, "factor a needs two different levels"),
        (lambda t: t.assign(a=t["a"] * 3), SQUARE, "table has runs with a 3; name that level, or drop"),
        (lambda t: t, {"c": (0, 1)}, "lacks the column.s. c"),
        (lambda t: t, {}, "factors names no column"),
        (lambda t: t.iloc[:0], SQUARE, "no rows"),
    ],
)
def test_designs_that_are_not_full_factorials_are_refused(change, factors, message):
    table = change(design(SQUARE, lambda *_: 1.0, seeds=2))
    for function in (factorial_effects, factorial_shares):
        with pytest.raises(ValueError, match=message) as error:
            function(table, factors)
        assert "\n" not in str(error.value)


def test_bad_values_are_refused():
    table = design(SQUARE, lambda *_: 1.0, seeds=2)
    with pytest.raises(ValueError, match="value must be finite"):
        factorial_effects(table.assign(value=np.nan), SQUARE)
    with pytest.raises(ValueError, match="before must be at most value in every run"):
        factorial_effects(table.assign(before=2.0), SQUARE, lower="before")
    for function in (factorial_effects, factorial_shares):
        with pytest.raises(ValueError, match="confidence 95"):
            function(table, SQUARE, confidence=95)
