"""Confidence intervals of means, ratios and proportions of few independent values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import special, stats

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics.inputs import check_confidence, numbers

FEW = 10  # values below which BCa's acceleration, a third moment from a jackknife, is noise


def wilson(correct: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson 1927).

    It contains correct / count. It reaches 0 or 1 exactly where that does, whatever the rounding.

    Args:
        correct: Successes.
        count: Trials.
        z: Quantile of the normal distribution; the default gives 95 %.

    Returns:
        Low and high; (0, 1) for no trials.
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
    """A statistic of n independent values, with a bootstrap interval.

    From `FEW` values on the interval is BCa (Efron 1987). With fewer, and where BCa is undefined (for a
    statistic that takes only a few values), it is the percentile interval. Neither knows more than the data:
    for 3 seeds the interval of the mean is their range, which holds the true mean about three times in four.
    `mean_interval` is better there.

    Args:
        values: [n] numbers.
        statistic: Function of an array and an `axis`.
        confidence: Level of the interval, between 0 and 1.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        Estimate, low and high. Equal values give low = high = estimate, a single value nan for low and high.

    Raises:
        UserError: For no values, missing ones, or a confidence outside (0, 1).
    """
    data = numbers(values)
    check_confidence(confidence)
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


def mean_interval(
    values: Any, confidence: float = 0.95, bounds: tuple[float, float] | None = None
) -> tuple[float, float, float]:
    """Mean with Student's interval: mean ± t_{n-1} s / sqrt(n).

    It suits values that are roughly normal, or many. Take three accuracies that are near 1 where a seed
    learned and far below where it did not: the interval covers the true mean in only 26 to 74 % of cases, and
    has no width if they are equal. Show each seed there, and `share_interval` of how many learned.

    Args:
        values: [n] numbers.
        confidence: Level of the interval, between 0 and 1.
        bounds: The interval is cut to them; (0, 1) for accuracies.

    Returns:
        Mean, low and high. A single value gives nan for low and high.

    Raises:
        UserError: For no values, missing ones, or a confidence outside (0, 1).
    """
    data = numbers(values)
    check_confidence(confidence)
    mean, n = float(data.mean()), len(data)
    if n == 1:
        return mean, np.nan, np.nan
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * data.std(ddof=1) / n**0.5)
    low, high = bounds or (-np.inf, np.inf)
    return mean, max(low, mean - half), min(high, mean + half)


def geometric_mean_interval(values: Any, confidence: float = 0.95) -> tuple[float, float, float]:
    """Geometric mean of positive ratios: exp of `mean_interval` of their logarithms.

    Twice and half average to 1.

    Returns:
        Mean, low and high.

    Raises:
        UserError: For no values, missing ones, or ones that are not positive.
    """
    data = numbers(values)
    if (data <= 0).any():
        raise UserError(f"values must be positive, but the smallest is {data.min():g}")
    mean, low, high = np.exp(mean_interval(np.log(data), confidence))
    return float(mean), float(low), float(high)


def ratio_of_means(above: Any, below: Any, confidence: float = 0.95) -> tuple[float, float, float]:
    """Ratio of the means of n pairs, r = mean(above) / mean(below), with its interval.

    Unlike the mean of the ratios it does not depend on the few pairs whose `below` is near 0. The interval is
    Student's of the linearised ratio (delta method; Cochran 1977, chapter 6): of the values
    r + (above_i - r below_i) / mean(below), whose mean is r.

    Args:
        above: [n] numerators.
        below: [n] denominators, in the same order.
        confidence: Level of the interval, between 0 and 1.

    Returns:
        r, low and high; nan for all three if mean(below) is 0.

    Raises:
        UserError: For no pairs, missing values, or unequal lengths.
    """
    a, b = numbers(above, "above"), numbers(below, "below")
    if len(a) != len(b):
        raise UserError(f"above and below must be pairs, but have {len(a)} and {len(b)} values")
    if b.mean() == 0:
        return np.nan, np.nan, np.nan
    ratio = a.mean() / b.mean()
    return mean_interval(ratio + (a - ratio * b) / b.mean(), confidence)


def share_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a probability, from k successes in n independent trials, such as seeds that learned.

    Clopper and Pearson 1934: it covers the probability with at least `confidence`, whatever the probability
    and however small n. Student's interval of a few accuracies does not. 3 of 3 gives (0.29, 1).

    Args:
        k: Successes.
        n: Trials.
        confidence: Level of the interval, between 0 and 1.

    Returns:
        Low and high.

    Raises:
        UserError: Unless 0 <= k <= n and n >= 1, and for a confidence outside (0, 1).
    """
    check_confidence(confidence)
    if not 0 <= k <= n or n < 1:
        raise UserError(f"{k} of {n} is no share; give 0 <= k <= n and at least one trial")
    tail = (1 - confidence) / 2
    low = special.betaincinv(k, n - k + 1, tail) if k else 0.0
    high = special.betaincinv(k + 1, n - k, 1 - tail) if k < n else 1.0
    return float(low), float(high)
