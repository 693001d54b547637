"""Where a probe would end with more training sequences: its learning curve, extrapolated.

The curve is taken to approach a limit by a power law, as learning curves of many methods do (Viering & Loog
2021, arXiv 2103.10948):

    value(n) = limit - gap n^-rate          gap >= 0

For every limit and rate the gap is a least-squares solution, so both are searched on a grid and no start can
mislead the fit. The interval of the limit is that of its profile: all limits whose best curve fits about as
well as the best of all (F test).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics.inputs import check_confidence

RATES = np.geomspace(0.1, 2.0, 150)  # a slower curve cannot be told from a logarithm, which has no limit
LIMITS = 600  # limits that are tried, from the lowest measurement to the ceiling
PARAMETERS = 3


@dataclass(frozen=True)
class Limit:
    """Where a learning curve ends.

    Attributes:
        value: The limit; nan if the curve cannot be extrapolated.
        low: Lower end of its interval; nan if nothing is known.
        high: Upper end; nan if nothing is known, the ceiling if only the lower end is.
        why_not: Why the curve cannot be extrapolated; "" if it can.
    """

    value: float
    low: float
    high: float
    why_not: str = ""


def limit(n: Any, value: Any, ceiling: float, confidence: float = 0.95) -> Limit:
    """Extrapolate a learning curve, of which more is better, to any number of training sequences.

    Args:
        n: Training sequences of each measurement, positive; a number may come several times.
        value: What was measured with them, at most the ceiling.
        ceiling: The most that any number of sequences could reach.
        confidence: Of the interval, which covers the scatter of independent measurements about the curve.

    Returns:
        The limit, without a value if there are too few measurements, or if the curve may as well go on to the
        ceiling.

    Raises:
        UserError: n and value differ in length, n is not positive, or a value is above the ceiling.
    """
    from scipy.stats import f

    check_confidence(confidence)
    n, value = np.asarray(n, dtype=float), np.asarray(value, dtype=float)
    if n.shape != value.shape or n.ndim != 1 or not (n > 0).all():
        raise UserError(
            f"n must be as many positive numbers as values, not of shapes {n.shape}, {value.shape}"
        )
    if not (value <= ceiling).all():
        raise UserError(f"values reach {value.max():g}, above the ceiling {ceiling:g}; give what is possible")
    free = len(n) - PARAMETERS
    if len(np.unique(n)) < PARAMETERS or free < 1:
        said = f"{len(n)} measurements at {len(np.unique(n))} numbers of sequences are too few"
        return Limit(np.nan, np.nan, np.nan, said)
    tried = np.linspace(value.min(), ceiling, LIMITS)
    power = (n / n.min()) ** -RATES[:, None]  # (rates, n)
    short = tried[:, None] - value  # (limits, n)
    along, length = short @ power.T, (power**2).sum(1)  # (limits, rates), (rates,)
    gap = np.maximum(0, along) / length
    missed = (short**2).sum(1) - (gap * (2 * along - gap * length)).max(1)  # of the best rate
    best = int(missed.argmin())
    least = max(float(missed[best]), float(np.finfo(float).eps) * float((value**2).sum()))
    kept = np.flatnonzero(missed <= least * (1 + float(f.ppf(confidence, 1, free)) / free))
    low, high = float(tried[kept[0]]), float(tried[kept[-1]])
    if kept[-1] == LIMITS - 1:
        return Limit(np.nan, low, high, "the curve may as well go on to the ceiling")
    return Limit(float(tried[best]), low, high)
