"""How much is needed until a run gets there, where some runs never do: Kaplan-Meier curves and medians."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics.inputs import check_confidence, numbers

STEPS = 20_000  # of the EM algorithm, at most
NOTHING = 1e-6  # probability that it may leave where there is none
EVEN = 1e-12  # slack that keeps rounding from deciding whether a product of fractions is <= 1/2


def censored(value: Any, reached: Any) -> tuple[np.ndarray, np.ndarray]:
    """Runs in the order in which a survival curve takes them.

    Args:
        value: [n] what each run needed, or spent without getting there; any unit.
        reached: [n] bool; whether it got there.

    Returns:
        Values, [n] float64, ascending, and flags, [n] bool. Among equal values those that got there come
        first (Kaplan and Meier 1958).

    Raises:
        UserError: For no runs, unequal lengths, and negative or missing values.
    """
    values, flags = numbers(value, "value"), np.asarray(reached)
    if flags.shape != values.shape or not np.isin(flags, (0, 1)).all():
        raise UserError(f"reached must hold one truth value for each of the {len(values)} entries of value")
    if (values < 0).any():
        raise UserError(f"value must not be negative, but its smallest is {values.min():g}")
    order = np.lexsort((~flags.astype(bool), values))
    return values[order], flags.astype(bool)[order]


def kaplan_meier(value: Any, reached: Any) -> pd.DataFrame:
    """Share of runs that still need more, by what was spent (Kaplan and Meier 1958).

        S(t) = prod over t_i <= t of (1 - d_i / n_i)

    Args:
        value: [n] what each run needed, or spent without getting there; any unit.
        reached: [n] bool; whether it got there.

    Returns:
        One row per different value, ascending, with the columns time (t_i), survival (S(t_i)), at_risk (n_i,
        runs with a value of at least t_i) and events (d_i, those of them that got there at t_i).

    Raises:
        UserError: As `censored`.
    """
    values, flags = censored(value, reached)
    time, first = np.unique(values, return_index=True)
    at_risk = len(values) - first
    events = np.add.reduceat(flags.astype(int), first)
    survival = np.cumprod(1 - events / at_risk)
    return pd.DataFrame(dict(time=time, survival=survival, at_risk=at_risk, events=events))


def _medians(values: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """First time with S <= 1/2 in each row, or inf; two [rows, n] arrays, sorted as by `censored`.

    Taking tied runs one by one gives the same S at the end of the tie: (1 - 1/n)(1 - 1/(n-1)) = (n - 2) / n.
    """
    survival = np.cumprod(1 - flags / (values.shape[1] - np.arange(values.shape[1])), axis=1)
    half = survival <= 0.5 + EVEN
    medians = np.take_along_axis(values, half.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(half.any(axis=1), medians, np.inf)


def median_time(value: Any, reached: Any) -> float:
    """Median of what runs need: the first t with S(t) <= 1/2 of `kaplan_meier`.

    It is inf if fewer than half of the runs get there, and the lower median if all do.

    Raises:
        UserError: As `censored`.
    """
    values, flags = censored(value, reached)
    return float(_medians(values[None], flags[None])[0])


def bootstrap_median_time(
    value: Any, reached: Any, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """`median_time` with a bootstrap interval: runs are resampled with their flags (Efron 1981).

    The percentile interval's ends are resampled medians, rounded outward, since nothing lies between a number
    and inf.

    Args:
        value: [n] what each run needed, or spent without getting there; any unit.
        reached: [n] bool; whether it got there.
        confidence: Level of the interval, between 0 and 1.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        Median, low and high; each may be inf. A single run gives nan for low and high.

    Raises:
        UserError: As `censored`, and for a confidence outside (0, 1).
    """
    values, flags = censored(value, reached)
    check_confidence(confidence)
    estimate = float(_medians(values[None], flags[None])[0])
    if len(values) == 1:
        return estimate, np.nan, np.nan
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    draws.sort(axis=1)  # indices of sorted runs: sorted draws are sorted runs
    medians = np.sort(_medians(values[draws], flags[draws]))
    tail = (1 - confidence) / 2 * (resamples - 1)
    return estimate, float(medians[int(tail)]), float(medians[resamples - 1 - int(tail)])


# --- known only to an evaluation ---------------------------------------------------------------------------


def turnbull(lower: Any, value: Any, reached: Any) -> pd.DataFrame:
    """Distribution of what runs need, if each is known only to lie between two evaluations (Turnbull 1976).

    The distribution of maximum likelihood puts all its mass on intervals from some run's lower end to the
    next upper end; the data do not say how it is spread within one. If evaluations are so dense that no two
    runs share an interval, it is the one of Kaplan and Meier.

    Args:
        lower: [n] what the run had spent at its last evaluation without getting there.
        value: [n] what it had spent when it was first seen to be there, or in all if it never was.
        reached: [n] bool; whether it got there.

    Returns:
        One row per interval (lower, upper] that has mass, ascending, with its probability. upper is inf for
        the mass of runs that never got there.

    Raises:
        UserError: As `censored`, and unless 0 <= lower < value for runs that got there.
    """
    left, right = _bounds(lower, value, reached)
    starts, ends = np.unique(left), np.unique(right)
    nearest = starts[np.searchsorted(starts, ends) - 1]  # the last start before each end
    first = np.unique(nearest, return_index=True)[1]  # and of ends with the same start only the first
    starts, ends = nearest[first], ends[first]
    inside = (left[:, None] <= starts) & (ends <= right[:, None])
    mass = np.full(len(starts), 1 / len(starts))
    for _ in range(STEPS):  # expectation and maximisation: a run's share of each interval, then their mean
        shares = inside * mass
        new = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
        done = np.abs(new - mass).max() < EVEN
        mass = new
        if done:
            break
    table = pd.DataFrame(dict(lower=starts, upper=ends, probability=mass))
    return table[table["probability"] > NOTHING].reset_index(drop=True)


def median_bounds(lower: Any, value: Any, reached: Any) -> tuple[float, float]:
    """Between which evaluations the median of what runs need lies: where `turnbull` passes 1/2.

    This is what the grid of evaluations leaves open. It is no confidence interval; `median_interval` gives
    one.

    Args:
        lower: [n] what the run had spent at its last evaluation without getting there.
        value: [n] what it had spent when it was first seen to be there, or in all if it never was.
        reached: [n] bool; whether it got there.

    Returns:
        Lower and upper end; the upper one is inf if fewer than half of the runs get there.

    Raises:
        UserError: As `turnbull`.
    """
    table = turnbull(lower, value, reached)
    passed = table["probability"].cumsum() >= 0.5 - NOTHING
    row = table[passed].iloc[0]
    return float(row["lower"]), float(row["upper"])


def median_interval(
    lower: Any, value: Any, reached: Any, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Interval of the median of what runs need, where each is known only to lie between two evaluations.

    The d-th smallest and the d-th largest of n values hold the median between them with a probability of

        1 - 2 P(Bin(n, 1/2) < d),

    whatever the distribution (Thompson 1936). Here they are a lower end and an upper end, so the interval
    holds the median at least as often. It is the narrowest with the confidence asked for or, where no
    interval of so few runs has that, the widest: of three runs its confidence is 0.75, of five 0.9375.

    Args:
        lower: [n] what the run had spent at its last evaluation without getting there.
        value: [n] what it had spent when it was first seen to be there, or in all if it never was.
        reached: [n] bool; whether it got there.
        confidence: The level asked for, between 0 and 1.

    Returns:
        Low, high, which may be inf, and the level that the interval has. A single run has 0.

    Raises:
        UserError: As `turnbull`, and for a confidence outside (0, 1).
    """
    check_confidence(confidence)
    left, right = (np.sort(ends) for ends in _bounds(lower, value, reached))
    n = len(left)
    level = 1 - 2 * stats.binom.cdf(np.arange((n + 1) // 2), n, 0.5)  # without d = 1, 2, .. values outside
    outside = max(0, int((level >= confidence).sum()) - 1)
    return float(left[outside]), float(right[-1 - outside]), max(0.0, float(level[outside]))


def _bounds(lower: Any, value: Any, reached: Any) -> tuple[np.ndarray, np.ndarray]:
    """The ends of (left, right], which holds what each run needs; right is inf where it never got there."""
    censored(value, reached)
    low, high, flags = numbers(lower, "lower"), numbers(value, "value"), np.asarray(reached).astype(bool)
    if low.shape != high.shape:
        raise UserError(f"lower must hold one number for each of the {len(high)} entries of value")
    if (low < 0).any() or (low[flags] >= high[flags]).any():
        raise UserError("lower must be at least 0, and below value for every run that got there")
    return np.where(flags, low, high), np.where(flags, high, np.inf)
