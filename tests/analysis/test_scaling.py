"""Outcomes of runs, their summary, power laws with censored runs and accuracy by position."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.scaling import accuracy_by_position, fit_power_law, fit_power_laws
from ssm_retrieval.statistics import wilson
from ssm_retrieval.training.outcomes import examples_to_threshold, reachable_length, summarise


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def run(name, at_goal, *, final=None, seq_len=64, model="mamba", seed=0, train=None, **more):
    """Rows of a run: accuracy at the goal at steps 100, 200, ..; train: (length, accuracy) beside it."""
    config = dict(run=name, model=model, seed=seed, seq_len=seq_len, task="position", layout="suffix")
    config |= dict(preset="tiny", position=None, d_state=16.0, n_layer=4, lr=2e-3) | more
    rows = []
    for i, accuracy in enumerate(at_goal, start=1):
        length, own = train[i - 1] if train else (seq_len, accuracy)
        when = dict(step=100 * i, examples=1000.0 * i, tokens=64_000 * i, seconds=1.5 * i, kind="during")
        for here, score in {length: own, seq_len: accuracy}.items():
            rows.append(
                config | when | dict(train_length=length, length=here, accuracy=score, chance=1 / here)
            )
    if final is not None:
        rows.append(rows[-1] | dict(kind="final", accuracy=final))
    return rows


def table(*parts):
    return pd.DataFrame([row for rows in parts for row in rows]).sample(frac=1, random_state=0)


# --- one row per run ---


def test_examples_to_threshold():
    evaluations = table(
        run("fast", [0.1, 0.95, 0.5, 1.0], final=0.99, train=[(8, 1.0), (16, 1.0), (64, 0.5), (64, 1.0)]),
        run("at once", [1.0], final=1.0),
        run("never", [0.1, 0.2, 0.3], final=0.31),
        run("unfinished", [0.1, 0.2]),
        run("unfinished but reached", [0.1, 0.97]),
        run("lucky final", [0.1, 0.2], final=0.96),  # only evaluations during training say when
        run("lucky once", [0.1, 0.97, 0.94], final=0.93),  # the final evaluation does not agree
        run("fell back", [0.1, 0.97, 0.2]),
    )
    rows = examples_to_threshold(evaluations).set_index("run")
    expected = {
        "fast": (1000, 2000, True, True, 0.99),
        "at once": (0, 1000, True, True, 1.0),
        "never": (3000, 3000, False, True, 0.31),
        "unfinished": (2000, 2000, False, False, 0.2),
        "unfinished but reached": (1000, 2000, True, False, 0.97),
        "lucky final": (2000, 2000, False, True, 0.96),
        "lucky once": (3000, 3000, False, True, 0.93),
        "fell back": (3000, 3000, False, False, 0.2),
    }
    assert len(rows) == len(expected)
    for name, values in expected.items():
        assert tuple(rows.loc[name, ["lower", "value", "reached", "finished", "accuracy"]]) == values, name
    assert (rows["chance"] == 1 / 64).all() and rows["d_state"].eq(16).all() and rows["lr"].eq(2e-3).all()
    assert not {"step", "examples", "length", "train_length", "kind", "seconds"} & set(rows.columns)
    assert examples_to_threshold(evaluations, by="seconds").set_index("run").loc["fast", "value"] == 3.0
    assert examples_to_threshold(evaluations, 0.3).set_index("run").loc["never", "value"] == 3000


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.05, 0.5), st.floats(0.5, 1))
def test_a_higher_threshold_never_costs_less(curve, lower, higher):
    evaluations = table(run("r", curve, final=curve[-1]))
    low, high = (examples_to_threshold(evaluations, t).iloc[0] for t in (lower, higher))
    assert high["value"] >= low["value"] and low["reached"] >= high["reached"]
    for row in (low, high):
        assert row["lower"] < row["value"] if row["reached"] else row["lower"] == row["value"]
    longest = [reachable_length(evaluations, t)["value"].item() for t in (lower, higher)]
    assert longest[0] >= longest[1]


def test_two_models_of_one_folder_are_two_runs():
    evaluations = table(run("x", [0.1, 1.0]), run("x", [0.1, 0.2], model="transformer", position="learned"))
    rows = examples_to_threshold(evaluations).set_index("model")
    assert rows["reached"].to_dict() == {"mamba": True, "transformer": False}


def test_reachable_length():
    curriculum = [(8, 1.0), (16, 0.96), (32, 0.9)]
    rows = reachable_length(
        table(
            run("stuck", [0.1, 0.1, 0.1], train=curriculum),
            run("there", [0.1, 0.1, 0.97], train=curriculum),
            run("nothing", [0.1, 0.1], final=1.0),
            run("lucky", [0.1, 0.1, 0.97], final=0.93, train=[(8, 1.0), (32, 0.5), (64, 0.97)]),
            run("passed in training", [0.1, 0.9], final=0.9, longest_length=64, train=[(16, 0.9), (64, 0.9)]),
        )
    ).set_index("run")
    expected = {"stuck": 16, "there": 64, "nothing": 0, "lucky": 32, "passed in training": 16}
    assert rows["value"].to_dict() == expected
    assert rows.index[rows["at_goal"]].tolist() == ["there"]


def test_lengths_beyond_training_do_not_count_as_reachable():
    rows = run("r", [0.1], train=[(8, 1.0)])
    extra = rows[0] | dict(length=32, accuracy=1.0)
    assert reachable_length(table(rows, [extra]))["value"].item() == 8


# --- one row per cell ---


def test_summarise():
    evaluations = table(
        run("m0", [0.1, 1.0], final=0.95, seed=0),
        run("m1", [0.1, 0.2, 1.0], final=1.0, seed=1),
        run("m2", [0.1, 0.2, 0.3], final=0.2, seed=2),
        run("t0", [0.1], model="transformer", position="learned", d_state=np.nan, seed=0),
    )
    cells = summarise(evaluations)
    mamba, transformer = (cells[cells["model"] == m].iloc[0] for m in ("mamba", "transformer"))
    assert len(cells) == 2  # missing position and missing d_state are groups
    assert (mamba["seeds"], mamba["runs"], mamba["finished"], mamba["reached"]) == (3, 3, 3, 2)
    assert mamba["accuracy"] == pytest.approx((0.95 + 1 + 0.2) / 3)
    assert (mamba["accuracy_min"], mamba["accuracy_max"]) == (0.2, 1.0)
    share = stats.beta.ppf([0.025, 0.975], [2, 3], [2, 1])  # Clopper and Pearson in closed form
    assert (mamba["reached_low"], mamba["reached_high"]) == pytest.approx(tuple(share))
    # the second run passed between 2,000 and 3,000, the first between 1,000 and 2,000, the third never did
    assert (mamba["examples_after"], mamba["examples"]) == (2000, 3000)
    assert (mamba["examples_low"], mamba["examples_high"]) == (1000, np.inf)
    assert mamba["examples_confidence"] == 0.75
    assert mamba["reachable_length"] == pytest.approx(128 / 3) and mamba["chance"] == 1 / 64
    assert (
        transformer["examples"] == np.inf
        and transformer["accuracy_min"] == transformer["accuracy_max"] == 0.1
    )
    assert transformer["finished"] == 0 and transformer["reached"] == 0


def test_summarise_refuses_to_mix_configurations():
    evaluations = table(run("a", [0.1], lr=1e-3), run("b", [0.1], lr=2e-3))
    with pytest.raises(ValueError, match=r"has a seed twice \(what differs: lr\); filter"):
        summarise(evaluations)
    assert summarise(evaluations, by=["model", "lr"])["seeds"].tolist() == [1, 1]
    pooled = summarise(evaluations, by=["model"])
    assert pooled["seeds"].item() == 1 and pooled["runs"].item() == 2


# --- power laws ---

LENGTHS = np.repeat([32, 64, 128, 256, 512], 4)


def simulate(rng, exponent=1.7, sigma=0.6, spent=np.inf):
    value = np.exp(2 + exponent * np.log(LENGTHS) + rng.normal(0, sigma, len(LENGTHS)))
    return np.minimum(value, spent), value <= spent


@pytest.mark.parametrize("sigma", [1e-3, 0.5, 5])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_without_censoring_it_is_least_squares(sigma, confidence):
    value, reached = simulate(np.random.default_rng(0), sigma=sigma)
    law = fit_power_law(LENGTHS, value, reached, confidence)
    line = stats.linregress(np.log(LENGTHS), np.log(value))
    half = stats.t.ppf((1 + confidence) / 2, len(value) - 2) * line.stderr
    found = (law.exponent, law.exponent_low, law.exponent_high, np.log(law.prefactor))
    np.testing.assert_allclose(
        found, (line.slope, line.slope - half, line.slope + half, line.intercept), atol=1e-6
    )
    residual = np.log(value) - np.log(law.predict(LENGTHS))
    assert law.sigma == pytest.approx(np.sqrt(np.mean(residual**2)), abs=1e-6)
    assert (law.n, law.n_reached, law.note) == (20, 20, "")


def test_censored_runs_are_needed_to_find_the_slope():
    """Over 40 experiments whose budget ends near the median of length 256."""
    rng, tobit, dropped, covered = np.random.default_rng(0), [], [], 0
    for _ in range(40):
        value, reached = simulate(rng, spent=np.exp(2 + 1.7 * np.log(256)))
        law = fit_power_law(LENGTHS, value, reached)
        tobit.append(law.exponent)
        dropped.append(stats.linregress(np.log(LENGTHS[reached]), np.log(value[reached])).slope)
        covered += law.exponent_low <= 1.7 <= law.exponent_high
    assert np.mean(tobit) == pytest.approx(1.7, abs=0.1)
    assert np.mean(dropped) < 1.55
    assert np.mean(np.abs(np.array(tobit) - 1.7)) < np.mean(np.abs(np.array(dropped) - 1.7))
    assert covered >= 34  # 38 expected; fewer than 34 has a probability of 0.3 %


def test_tobit_maximum_beats_a_search_from_many_starts():
    from scipy import optimize

    value, reached = simulate(np.random.default_rng(3), spent=40_000)
    x, y = np.log(LENGTHS), np.log(value)

    def negative(theta):
        a, b, log_sigma = theta
        z = (y - a - b * x) / np.exp(log_sigma)
        return -np.where(reached, stats.norm.logpdf(z) - log_sigma, stats.norm.logsf(z)).sum()

    starts = [(a, b, s) for a in (0, 5) for b in (0.5, 3) for s in (-1, 1)]
    options = dict(xatol=1e-9, fatol=1e-12, maxiter=4000, maxfev=4000)
    found = [optimize.minimize(negative, s, method="Nelder-Mead", options=options) for s in starts]
    best = min(found, key=lambda r: r.fun)
    law = fit_power_law(LENGTHS, value, reached)
    np.testing.assert_allclose((np.log(law.prefactor), law.exponent, np.log(law.sigma)), best.x, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(st.floats(1e-3, 1e6), st.integers(1, 8), st.integers(0, 1000))
def test_units_do_not_matter(unit, factor, seed):
    value, reached = simulate(np.random.default_rng(seed), spent=40_000)
    one, other = (
        fit_power_law(LENGTHS, value, reached),
        fit_power_law(LENGTHS * factor, value * unit, reached),
    )
    for name in ("exponent", "exponent_low", "exponent_high", "sigma"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-5), name
    np.testing.assert_allclose(other.predict(factor * 100), unit * one.predict(100), rtol=1e-5)


def test_what_the_runs_do_not_tell_is_nan_with_a_reason():
    two = fit_power_law([64, 128, 256], [10, 20, 99], [True, True, False])
    assert np.isnan([two.exponent, two.exponent_low, two.exponent_high]).all() and "only 2 of 3" in two.note
    assert (two.n, two.n_reached) == (3, 2)
    here = ([10, 11, 12], [True] * 3)
    same = fit_power_law([64] * 3, *here)
    assert np.isnan([same.exponent, same.exponent_low]).all() and "same length" in same.note
    both = fit_power_law([64] * 3 + [32, 128], [*here[0], 50, 50], [*here[1], False, False])
    assert np.isnan([both.exponent_low, both.exponent_high]).all()
    longer = fit_power_law([64] * 3 + [128] * 2, [*here[0], 500, 500], [*here[1], False, False])
    slope_to_the_budget = np.log(500 / 11) / np.log(2)
    assert np.isnan(longer.exponent) and 0 < longer.exponent_low < slope_to_the_budget
    assert longer.exponent_high == np.inf and "bound" in longer.note
    shorter = fit_power_law([64] * 3 + [32] * 2, [*here[0], 500, 500], [*here[1], False, False])
    assert shorter.exponent_high == pytest.approx(-longer.exponent_low)


def test_an_exact_line_has_no_width():
    for value, reached in (([8, 32, 128], [True] * 3), ([8, 32, 128, 200], [True] * 3 + [False])):
        law = fit_power_law(2 ** np.arange(1, 1 + len(value)), value, reached)
        assert (law.exponent, law.exponent_low, law.exponent_high) == pytest.approx((2, 2, 2))
        assert law.prefactor == pytest.approx(2) and law.sigma == 0 and "no scatter" in law.note
    beyond = fit_power_law([2, 4, 8, 16], [8, 32, 128, 9999], [True] * 3 + [False])  # censored above the line
    assert beyond.exponent > 2 and beyond.sigma > 0 and beyond.note == ""


def test_fit_power_laws():
    value, reached = simulate(np.random.default_rng(0), spent=40_000)
    one = pd.DataFrame(dict(seq_len=LENGTHS, value=value, reached=reached, model="mamba", layout="suffix"))
    outcomes = pd.concat([one.assign(position=None), one.assign(model="transformer", position="rope")])
    laws = fit_power_laws(outcomes)
    assert laws["model"].tolist() == ["mamba", "transformer"] and laws["n"].tolist() == [20, 20]
    expected = fit_power_law(LENGTHS, value, reached)
    assert laws["exponent"].tolist() == pytest.approx([expected.exponent] * 2)
    assert laws["lower_exponent"].isna().all()


def test_costs_are_known_to_an_evaluation_only():
    """Lower ends that are a factor of 3 sqrt(length) below: the least-squares slope falls by exactly 0.5."""
    value, reached = simulate(np.random.default_rng(0))
    one = pd.DataFrame(dict(seq_len=LENGTHS, value=value, reached=reached, model="mamba"))
    law = fit_power_laws(one.assign(lower=value / (3 * np.sqrt(LENGTHS))), by=["model"]).iloc[0]
    for end in ("", "_low", "_high"):
        assert law[f"lower_exponent{end}"] == pytest.approx(law[f"exponent{end}"] - 0.5, abs=1e-6)
    first = fit_power_laws(one.assign(lower=np.where(LENGTHS == 32, 0, value)), by=["model"]).iloc[0]
    assert np.isnan(first["lower_exponent"])  # reached at the first evaluation: no lower end


# --- positions ---


def test_accuracy_by_position():
    rows = [
        dict(run=f"r{s}", seed=s, model="mamba", seq_len=n, position=p, correct=p % 3, count=4, chance=1 / n)
        for s in range(2)
        for n in (4, 16)
        for p in range(n)
    ]
    bins = accuracy_by_position(pd.DataFrame(rows)).set_index("seq_len")
    short, long = bins.loc[4], bins.loc[16]
    np.testing.assert_allclose(short["relative"], (np.arange(4) + 0.5) / 4)  # one bin per symbol
    np.testing.assert_allclose(long["relative"], (np.arange(8) + 0.5) / 8)
    pooled = [2 * sum(p % 3 for p in (2 * b, 2 * b + 1)) for b in range(8)]
    assert long["correct"].tolist() == pooled and (long["count"] == 16).all()
    np.testing.assert_allclose(long["chance"], 1 / 16)
    for row in bins.itertuples():
        assert (row.ci_low, row.ci_high) == wilson(row.correct, row.count)
        assert row.ci_low <= row.accuracy <= row.ci_high
    assert bins["correct"].sum() == sum(row["correct"] for row in rows)


# --- bad input ---

GOOD = table(run("r", [0.1]))
POSITIONS = pd.DataFrame([dict(model="m", seq_len=4, position=4, correct=1, count=2, chance=0.25)])


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: examples_to_threshold(GOOD.drop(columns="seq_len")),
            "evaluations lacks the column.s. seq_len",
        ),
        (lambda: examples_to_threshold(GOOD.iloc[:0]), "no rows"),
        (lambda: examples_to_threshold(GOOD, by="epochs"), "choose from examples"),
        (lambda: examples_to_threshold(GOOD, threshold=95), "threshold 95"),
        (lambda: examples_to_threshold(GOOD.assign(examples=np.nan)), "run r lacks examples"),
        (lambda: examples_to_threshold(GOOD.assign(length=8)), "no evaluation at seq_len 64"),
        (
            lambda: examples_to_threshold(table(run("r", [0.1]), run("r", [0.1], seed=1))),
            "seed differs within",
        ),
        (lambda: reachable_length(GOOD.drop(columns="train_length")), "train_length"),
        (lambda: summarise(GOOD.drop(columns="preset")), "preset"),
        (lambda: summarise(GOOD, by=["step"]), "constant within a run"),
        (lambda: fit_power_law([1], [0], [True]), "positive"),
        (lambda: fit_power_law([1, 2], [1], [True]), "same length"),
        (lambda: fit_power_law([1], [1], [True], confidence=2), "confidence 2"),
        (lambda: fit_power_laws(GOOD), "lacks the column.s. value, reached"),
        (lambda: accuracy_by_position(POSITIONS), "counted from 0"),
        (lambda: accuracy_by_position(POSITIONS, bins=0), "bins 0"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
