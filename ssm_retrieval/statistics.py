"""Statistics for few and censored runs: survival curves, intervals and paired tests.

A run that never got to its goal is an observation ("more than this was needed"), not a missing value.
Where `value` comes with `reached`, value is what was needed if reached and what was spent in vain if not
(right-censored, as a patient who leaves a study alive).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ssm_retrieval.errors import UserError

EVEN = 1e-12  # slack that keeps rounding from deciding whether a product of fractions is <= 1/2
FEW = 10  # values below which BCa's acceleration, a third moment from a jackknife, is noise


def require(table: pd.DataFrame, columns: Iterable[str], name: str) -> None:
    """Raises UserError, in one line, if the table is empty or lacks a column."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise UserError(
            f"{name} lacks the column(s) {', '.join(missing)}; it has {', '.join(map(str, table.columns))}"
        )
    if table.empty:
        raise UserError(f"{name} has no rows; check the folder it was read from and its filters")


def _fraction(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UserError(f"confidence {confidence} must lie between 0 and 1, say 0.95")


def _values(values: Any, name: str = "values") -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not array.size:
        raise UserError(f"{name} must be a list of at least one number, not of shape {array.shape}")
    if not np.isfinite(array).all():
        raise UserError(f"{name} must be finite numbers; drop or repair the missing ones first")
    return array


def censored(value: Any, reached: Any) -> tuple[np.ndarray, np.ndarray]:
    """(n,) float and (n,) bool, sorted by value, events before censorings at ties (Kaplan & Meier 1958).

    Raises UserError for no runs, unequal lengths, negative or missing values.
    """
    values, flags = _values(value, "value"), np.asarray(reached)
    if flags.shape != values.shape or not np.isin(flags, (0, 1)).all():
        raise UserError(f"reached must hold one truth value for each of the {len(values)} entries of value")
    if (values < 0).any():
        raise UserError(f"value must not be negative, but its smallest is {values.min():g}")
    order = np.lexsort((~flags.astype(bool), values))
    return values[order], flags.astype(bool)[order]


# --- survival: how much is needed until a run gets there -------------------------------------------------


def kaplan_meier(value: Any, reached: Any) -> pd.DataFrame:
    """Share of runs that still need more, by what was spent: S(t) = prod_{t_i <= t} (1 - d_i / n_i).

    value: (n,) in any unit; reached: (n,) bool. Returns one row per different value, ascending: time = t_i,
    survival = S(t_i), at_risk = n_i runs with value >= t_i, events = d_i of them reached there. Kaplan and
    Meier 1958. Raises UserError as `censored`.
    """
    values, flags = censored(value, reached)
    time, first = np.unique(values, return_index=True)
    at_risk = len(values) - first
    events = np.add.reduceat(flags.astype(int), first)
    survival = np.cumprod(1 - events / at_risk)
    return pd.DataFrame(dict(time=time, survival=survival, at_risk=at_risk, events=events))


def _medians(values: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """First time with S <= 1/2 in each row of two (rows, n) arrays that are sorted as by `censored`; or inf.

    Taking runs one by one gives the same S at the end of a tie: (1 - 1/n)(1 - 1/(n-1)) = (n - 2) / n.
    """
    survival = np.cumprod(1 - flags / (values.shape[1] - np.arange(values.shape[1])), axis=1)
    half = survival <= 0.5 + EVEN
    medians = np.take_along_axis(values, half.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(half.any(axis=1), medians, np.inf)


def median_time(value: Any, reached: Any) -> float:
    """min {t: S(t) <= 1/2} of `kaplan_meier`, inf if half of the runs never get there.

    Without censoring the lower median. Raises UserError as `censored`.
    """
    values, flags = censored(value, reached)
    return float(_medians(values[None], flags[None])[0])


# --- intervals -------------------------------------------------------------------------------------------


def wilson(correct: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927); (0, 1) for no observations.

    It contains correct / count, and reaches 0 and 1 where that does: exactly, whatever the rounding.
    """
    if count == 0:
        return 0.0, 1.0
    p, n = correct / count, count
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low = 0.0 if correct == 0 else max(0.0, min(p, centre - half))
    high = 1.0 if correct == count else min(1.0, max(p, centre + half))
    return low, high


def bootstrap(
    values: Any,
    statistic: Callable[..., Any] = np.mean,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(estimate, low, high) of a statistic of n independent values, by resampling them.

    BCa (Efron 1987) from `FEW` values on; the percentile interval below and where BCa is undefined (for a
    statistic that takes only a few values). Neither knows more than the data: of 3 seeds the interval of the
    mean is their range, which holds the true one about three times in four; `mean_interval` is better there.
    No spread gives low = high = estimate, a single value nan bounds. Raises UserError for none, or missing
    ones.
    """
    data = _values(values)
    _fraction(confidence)
    estimate = float(statistic(data))
    if len(data) == 1:
        return estimate, np.nan, np.nan
    if (data == data[0]).all():
        return estimate, estimate, estimate
    for method in ("BCa", "percentile") if len(data) >= FEW else ("percentile",):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # BCa warns where it is undefined; its bounds are nan then
            interval = stats.bootstrap(
                (data,),
                statistic,
                confidence_level=confidence,
                n_resamples=resamples,
                method=method,
                random_state=np.random.default_rng(seed),
            ).confidence_interval
        low, high = float(interval.low), float(interval.high)
        if np.isfinite([low, high]).all():
            break
    return estimate, low, high


def bootstrap_median_time(
    value: Any, reached: Any, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """(median, low, high) of `median_time`, by resampling runs with their flags (Efron 1981); inf allowed.

    Percentile interval whose ends are resampled medians, rounded outward: nothing lies between a number and
    inf. A single run has nan bounds. Raises UserError as `censored`.
    """
    values, flags = censored(value, reached)
    _fraction(confidence)
    estimate = float(_medians(values[None], flags[None])[0])
    if len(values) == 1:
        return estimate, np.nan, np.nan
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    draws.sort(axis=1)  # indices of sorted runs: sorted draws are sorted runs
    medians = np.sort(_medians(values[draws], flags[draws]))
    tail = (1 - confidence) / 2 * (resamples - 1)
    return estimate, float(medians[int(tail)]), float(medians[resamples - 1 - int(tail)])


def mean_interval(
    values: Any, confidence: float = 0.95, bounds: tuple[float, float] | None = None
) -> tuple[float, float, float]:
    """(mean, low, high): Student's interval mean ± t_{n-1} s / sqrt(n), cut to bounds, (0, 1) of accuracies.

    For values that are roughly normal, or many. Of three accuracies that are near 1 where a seed learned and
    far below where it did not it covers the mean in 26 to 74 % of cases, and has no width where they are
    equal: show each seed, and `share_interval` of how many learned. A single value has nan bounds. Raises
    UserError for no values, or missing ones.
    """
    data = _values(values)
    _fraction(confidence)
    mean, n = float(data.mean()), len(data)
    if n == 1:
        return mean, np.nan, np.nan
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * data.std(ddof=1) / n**0.5)
    low, high = bounds or (-np.inf, np.inf)
    return mean, max(low, mean - half), min(high, mean + half)


def share_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of a probability, of which k of n independent trials (seeds that learned, say) came true.

    Clopper & Pearson 1934: covers at least `confidence` whatever the probability and however small n, unlike
    Student's interval of a few accuracies that are either near 1 or far below. 3 of 3 gives (0.29, 1).
    Raises UserError unless 0 <= k <= n and n >= 1.
    """
    _fraction(confidence)
    if not 0 <= k <= n or n < 1:
        raise UserError(f"{k} of {n} is no share; give 0 <= k <= n and at least one trial")
    found = stats.binomtest(int(k), int(n)).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)


# --- pairs: the same seed, data order and length under two architectures ----------------------------------


@dataclass(frozen=True)
class PairedTest:
    """difference: mean of a - b over n pairs, with its bootstrap interval. p_smallest: what n pairs allow."""

    a: str
    b: str
    n: int
    difference: float
    low: float
    high: float
    p: float  # exact sign-flip permutation test
    p_wilcoxon: float  # signed-rank test
    p_smallest: float  # 2 / 2^n: 5 pairs or fewer never come below 0.05


@dataclass(frozen=True)
class SignTest:
    """Who got there with less, in n = a_first + b_first + ties + unknown pairs."""

    a: str
    b: str
    n: int
    a_first: int
    b_first: int
    ties: int
    unknown: int  # neither got there, or one did but with more than the other had spent
    p: float  # exact two-sided binomial test of a_first against b_first
    p_smallest: float  # 2 / 2^(a_first + b_first)


def _pairs(
    table: pd.DataFrame, a: Any, b: Any, on: Sequence[str], columns: Sequence[str], factor: str
) -> pd.DataFrame:
    """One row for each combination of `on` that both levels have; columns end in _a and _b."""
    on, columns = list(on), list(columns)
    require(table, [factor, *on, *columns], "table")
    if not on or factor in on or a == b:
        raise UserError(f"on must name columns other than {factor}, and {a} differ from {b}")
    sides = []
    for level in (a, b):
        side = table.loc[table[factor] == level, [*on, *columns]]
        if side.empty:
            known = ", ".join(map(str, table[factor].dropna().unique()))
            raise UserError(f"table has no rows with {factor} {level}; choose from {known}")
        if side.duplicated(on).any():
            raise UserError(
                f"{factor} {level} has several rows with the same {', '.join(on)}; "
                "name the column that tells them apart in on, or filter"
            )
        if side[columns].isna().any(axis=None):
            raise UserError(f"{factor} {level} has missing {' or '.join(columns)}; drop those rows first")
        sides.append(side)
    pairs = sides[0].merge(sides[1], on=on, suffixes=("_a", "_b"))
    if pairs.empty:
        raise UserError(f"no row of {a} and {b} agree in {', '.join(on)}; name fewer columns in on")
    return pairs


def sign_flip_p(differences: Any) -> float:
    """Two-sided p of the mean if every difference's sign were a fair coin (Fisher 1935, § 21).

    Exact up to 13 differences (2^13 < 10,000 flips), else 10,000 random flips. Raises UserError for none.
    """
    data = _values(differences, "differences")
    if len(data) == 1 or not data.any():
        return 1.0

    # rounded: sums in another order that differ in their last bit are ties
    def statistic(x: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.round(x.mean(axis=axis), 12)

    result = stats.permutation_test(
        (data / np.abs(data).max(),),
        statistic,
        permutation_type="samples",
        n_resamples=10_000,
        random_state=np.random.default_rng(0),
    )
    return float(result.pvalue)


def paired_test(
    table: pd.DataFrame,
    a: str,
    b: str,
    on: Sequence[str],
    value: str = "accuracy",
    factor: str = "model",
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedTest:
    """Does `value` differ between levels a and b of `factor`, among rows that agree in the columns `on`?

    table: one row per run; rows without a partner are left out. p is exact under the hypothesis that swapping
    a and b within a pair changes nothing; with n pairs it cannot be less than 2 / 2^n. Pairs that share a
    seed but not a length are taken as independent. Raises UserError if nothing matches, a match is
    ambiguous, or `value` is a censored time (see `paired_sign_test`).
    """
    if value == "value" and "reached" in table and not table["reached"].all():
        raise UserError("value is censored where reached is False; use paired_sign_test")
    pairs = _pairs(table, a, b, on, [value], factor)
    differences = pairs[f"{value}_a"].to_numpy(float) - pairs[f"{value}_b"].to_numpy(float)
    difference, low, high = bootstrap(differences, confidence=confidence, seed=seed)
    p_wilcoxon = 1.0
    if differences.any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # older scipy warns of small samples with ties
            p_wilcoxon = float(stats.wilcoxon(differences).pvalue)
    n = len(pairs)
    p = sign_flip_p(differences)
    return PairedTest(a, b, n, difference, low, high, p, p_wilcoxon, min(1.0, 2.0 ** (1 - n)))


def paired_sign_test(
    table: pd.DataFrame,
    a: str,
    b: str,
    on: Sequence[str],
    value: str = "value",
    reached: str = "reached",
    factor: str = "model",
) -> SignTest:
    """Which of two levels gets there with less, where some runs never did (generalised sign test).

    The order of a pair is known if both reached, or one reached with no more than the other spent in vain.
    Ties and unknown pairs are counted but not tested, which is fair as long as both of a pair had the same
    budget. Raises UserError as `paired_test`.
    """
    pairs = _pairs(table, a, b, on, [value, reached], factor)
    time_a, time_b = (pairs[f"{value}_{side}"].to_numpy(float) for side in "ab")
    got_a, got_b = (pairs[f"{reached}_{side}"].to_numpy(bool) for side in "ab")
    a_first = int((got_a & np.where(got_b, time_a < time_b, time_a <= time_b)).sum())
    b_first = int((got_b & np.where(got_a, time_b < time_a, time_b <= time_a)).sum())
    ties = int((got_a & got_b & (time_a == time_b)).sum())
    known, n = a_first + b_first, len(pairs)
    p = float(stats.binomtest(a_first, known).pvalue) if known else 1.0
    unknown = n - known - ties
    return SignTest(a, b, n, a_first, b_first, ties, unknown, p, min(1.0, 2.0 ** (1 - known)))


def holm(p: Any) -> np.ndarray:
    """(m,) p-values, corrected for m tests in the given order: max_{j <= i} (m - j + 1) p_(j) (Holm 1979)."""
    data = _values(p, "p")
    order = np.argsort(data)
    corrected = np.empty_like(data)
    corrected[order] = np.minimum(np.maximum.accumulate(data[order] * np.arange(len(data), 0, -1)), 1)
    return corrected
