"""How much is needed until a run gets there, where some runs never do: Kaplan-Meier curves and medians."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics.inputs import check_confidence, numbers

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
        UserError: for no runs, unequal lengths, and negative or missing values.
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
        UserError: as `censored`.
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
        UserError: as `censored`.
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
        confidence: level of the interval, between 0 and 1.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        Median, low and high; each may be inf. A single run gives nan for low and high.

    Raises:
        UserError: as `censored`, and for a confidence outside (0, 1).
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
