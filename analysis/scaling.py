"""How runs scale with the context length: power laws of what they needed, and accuracy by position."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, stats

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics import require, wilson

BINS = 8  # parts of the context, by default
EXACT = 1e-9  # scatter of log(value), relative to its size, that is rounding


# --- power laws ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerLaw:
    """A fitted law; numbers that the runs do not determine are nan, and note says why.

        value = prefactor * length^exponent * exp(N(0, sigma^2))

    Attributes:
        exponent: Slope of log(value) against log(length).
        exponent_low: Lower end of its interval.
        exponent_high: Upper end.
        prefactor: Median value at length 1, in the unit of value.
        sigma: Maximum-likelihood scatter of log(value), which divides by n.
        n: Number of runs.
        n_reached: How many of them reached the threshold.
        note: Why numbers are missing, or how they were found.
    """

    exponent: float
    exponent_low: float
    exponent_high: float
    prefactor: float
    sigma: float
    n: int
    n_reached: int
    note: str = ""

    def predict(self, length: Any) -> np.ndarray:
        """Median value at each length."""
        return self.prefactor * np.asarray(length, dtype=float) ** self.exponent


def _tobit(y: np.ndarray, design: np.ndarray, reached: np.ndarray) -> tuple[np.ndarray, float, float]:
    """(coefficients, sigma, log-likelihood) of y = design @ coefficients + N(0, sigma^2), y right-censored.

    y: (n,); design: (n, k); reached: (n,) bool. Tobin 1958. In delta = coefficients / sigma and
    gamma = 1 / sigma the log-likelihood sum_reached [log gamma - u^2 / 2] + sum_censored log sf(u),
    u = gamma y - design @ delta, is concave (Olsen 1978), so Newton steps find its only maximum from any
    start: here least squares over all rows, whose residuals also set the scale. Constants are left out.
    """
    start = np.linalg.lstsq(design, y, rcond=None)[0]
    residual = y - design @ start
    scale = float(np.sqrt(np.mean(residual**2)))
    z = np.column_stack([-design, residual / scale])  # u = z @ (delta, gamma)
    m = int(reached.sum())

    def hazard(u: np.ndarray) -> np.ndarray:
        return np.exp(stats.norm.logpdf(u) - stats.norm.logsf(u))

    def negative(theta: np.ndarray) -> float:
        u, gamma = z @ theta, theta[-1]
        if gamma <= 0:
            return np.inf
        parts = np.where(reached, -(u**2) / 2, stats.norm.logsf(u))
        return float(-m * np.log(gamma) - parts.sum())

    def gradient(theta: np.ndarray) -> np.ndarray:
        u = z @ theta
        slope = z.T @ np.where(reached, u, hazard(u))
        slope[-1] -= m / theta[-1]
        return slope

    def hessian(theta: np.ndarray) -> np.ndarray:
        u = z @ theta
        h = hazard(u)
        bend = (z * np.where(reached, 1.0, np.clip(h * (h - u), 0, 1))[:, None]).T @ z
        bend[-1, -1] += m / theta[-1] ** 2
        return bend

    theta = np.zeros(z.shape[1])
    theta[-1] = 1.0
    found = optimize.minimize(
        negative, theta, jac=gradient, hess=hessian, method="trust-exact", options={"gtol": 1e-9}
    )
    delta, gamma = found.x[:-1], found.x[-1]
    return start + scale * delta / gamma, float(scale / gamma), float(-found.fun - m * np.log(scale))


def _crossing(excess: Callable[[float], float], inside: float, step: float) -> float:
    """Where excess, negative inside and increasing in the direction of step, becomes zero; else ±inf."""
    for _ in range(60):
        outside = inside + step
        if excess(outside) > 0:
            return float(optimize.brentq(excess, inside, outside, xtol=1e-10))
        inside, step = outside, 2 * step
    return float(np.copysign(np.inf, step))


def fit_power_law(length: Any, value: Any, reached: Any, confidence: float = 0.95) -> PowerLaw:
    """Fit a power law by maximum likelihood (Tobin 1958); of runs that never got there only a bound is known.

        log(value) = a + b log(length) + N(0, sigma^2)

    Dropping those runs would bias b towards 0, because the hardest lengths lose their slowest runs. The
    interval of b holds the slopes whose profile log-likelihood is within

        m log(1 + t^2 / (m - 2)) / 2

    of the maximum, where m is the number of runs that got there and t Student's quantile with m - 2 degrees
    of freedom. Without censoring this is exactly the t-interval of least squares. The fit needs 3 runs that
    got there, at 2 lengths. If all of them had one length, and only longer ones (or only shorter ones) were
    tried in vain, the result is a one-sided bound.

    Args:
        length: Context lengths (n,), positive.
        value: What the runs needed, or had spent when they ended (n,), positive.
        reached: Whether they got there (n,), bool.
        confidence: Of the interval.

    Returns:
        The law.

    Raises:
        UserError: Shapes differ, or numbers are not finite and positive.
    """
    lengths, values, flags = (np.asarray(x) for x in (length, value, reached))
    if not lengths.shape == values.shape == flags.shape or lengths.ndim != 1 or not lengths.size:
        raise UserError("length, value and reached must be three lists of the same length, at least 1")
    if not all(np.isfinite(x).all() and (x > 0).all() for x in (lengths.astype(float), values.astype(float))):
        raise UserError("length and value must be finite and positive, or they have no logarithm")
    if not 0 < confidence < 1:
        raise UserError(f"confidence {confidence} must lie between 0 and 1, say 0.95")
    x, y, got = np.log(lengths.astype(float)), np.log(values.astype(float)), flags.astype(bool)
    n, m, nan = len(y), int(got.sum()), float("nan")
    if m < 3:
        note = f"only {m} of {n} runs got there; a slope and its scatter need 3"
        return PowerLaw(nan, nan, nan, nan, nan, n, m, note)
    cut = m * np.log1p(stats.t.ppf((1 + confidence) / 2, m - 2) ** 2 / (m - 2))
    centre = x[got].mean()
    x = x - centre
    ones = np.ones((n, 1))
    if len(np.unique(lengths[got])) < 2:
        return _one_length(x, y, got, cut)
    design = np.column_stack([ones, x])
    line, *_ = np.linalg.lstsq(design[got], y[got], rcond=None)
    off = y - design @ line
    tiny = EXACT * max(1.0, float(np.abs(y).max()))
    if np.abs(off[got]).max() <= tiny and not (off[~got] > tiny).any():
        b, a = float(line[1]), float(line[0] - line[1] * centre)
        note = "no scatter around the line, so the interval has no width"
        return PowerLaw(b, b, b, float(np.exp(a)), 0.0, n, m, note)
    coefficients, sigma, best = _tobit(y, design, got)
    b = float(coefficients[1])

    def excess(slope: float) -> float:
        return 2 * (best - _tobit(y - slope * x, ones, got)[2]) - cut

    step = sigma / float(np.sqrt((x[got] ** 2).sum()))
    low, high = _crossing(excess, b, -step), _crossing(excess, b, step)
    return PowerLaw(b, low, high, float(np.exp(coefficients[0] - b * centre)), sigma, n, m)


def _one_length(x: np.ndarray, y: np.ndarray, got: np.ndarray, cut: float) -> PowerLaw:
    """All runs that got there had one length, x = 0: at most a bound of the slope, from those elsewhere.

    The likelihood then has no maximum but a supremum, for a slope of ±inf that explains all of them; it is
    that of the runs at x = 0 alone.
    """
    n, m, nan = len(y), int(got.sum()), float("nan")
    here = np.abs(x) < EXACT
    sides = set(np.sign(x[~here]))
    note = "all runs that got there had the same length"
    scatter = float(np.ptp(y[got])) > EXACT * max(1.0, float(np.abs(y).max()))
    if len(sides) != 1 or not scatter:
        return PowerLaw(nan, nan, nan, nan, nan, n, m, note)
    (side,) = sides
    _, sigma, supremum = _tobit(y[here], np.ones((int(here.sum()), 1)), got[here])

    def excess(slope: float) -> float:
        return 2 * (supremum - _tobit(y - slope * x, np.ones((n, 1)), got)[2]) - cut

    step = side * (sigma + float(np.ptp(y))) / float(np.abs(x).max())
    steep = step
    while excess(steep) >= 0:
        steep *= 2
    bound = _crossing(excess, steep, -step)
    low, high = (bound, np.inf) if side > 0 else (-np.inf, bound)
    return PowerLaw(nan, low, high, nan, nan, n, m, f"{note}; a bound from those in vain elsewhere")


def fit_power_laws(
    outcomes: pd.DataFrame, by: Sequence[str] = ("model", "position", "layout"), confidence: float = 0.95
) -> pd.DataFrame:
    """Fit a power law of value against seq_len in each group, by `fit_power_law` with its errors.

    Args:
        outcomes: Result of `ssm_retrieval.training.outcomes.examples_to_threshold`.
        by: Columns that make the groups; missing values are a group of their own.
        confidence: Of the intervals.

    Returns:
        One row per group with the fields of `PowerLaw`. The truth lies between two evaluations, in
        (lower, value]; lower_exponent with _low and _high is therefore the fit with the lower ends of runs
        that got there. It is nan without column lower, or if one of its values is 0.
    """
    require(outcomes, [*by, "seq_len", "value", "reached"], "outcomes")
    rows = []
    for cell, group in outcomes.groupby(list(by), dropna=False, sort=True):
        law = fit_power_law(group["seq_len"], group["value"], group["reached"], confidence)
        below = dict.fromkeys(("lower_exponent", "lower_exponent_low", "lower_exponent_high"), float("nan"))
        if "lower" in group and (group["lower"] > 0).all():
            other = fit_power_law(group["seq_len"], group["lower"], group["reached"], confidence)
            below = dict(zip(below, (other.exponent, other.exponent_low, other.exponent_high), strict=True))
        rows.append(dict(zip(by, cell, strict=True)) | dataclasses.asdict(law) | below)
    return pd.DataFrame(rows)


# --- positions -------------------------------------------------------------------------------------------


def accuracy_by_position(
    positions: pd.DataFrame, bins: int = BINS, by: Sequence[str] = ("model", "seq_len")
) -> pd.DataFrame:
    """Accuracy by where in the context the answer stood, pooled over runs in equal parts of the context.

    The interval treats answers as independent: it ignores that seeds differ.

    Args:
        positions: Columns run, seed, model, seq_len, position (0-based), correct, count, chance.
        bins: Parts of the context. A shorter context has one part per symbol.
        by: Columns that make the groups.

    Returns:
        One row per group and bin: relative (centre of the bin, in (0, 1)), correct, count, accuracy, its 95 %
        Wilson interval ci_low and ci_high, chance (mean over answers).

    Raises:
        UserError: A column is missing, bins is below 1, or a position lies outside of the context.
    """
    require(positions, [*by, "seq_len", "position", "correct", "count", "chance"], "positions")
    if bins < 1:
        raise UserError(f"bins {bins} must be at least 1")
    if not positions["position"].between(0, positions["seq_len"] - 1).all():
        raise UserError("position must lie in 0 .. seq_len - 1; is it counted from 0?")
    table = positions.assign(_bins=positions["seq_len"].clip(upper=bins))
    table["bin"] = table["position"] * table["_bins"] // table["seq_len"]
    table["chance"] = table["chance"] * table["count"]
    keys = list(dict.fromkeys([*by, "_bins", "bin"]))
    pooled = table.groupby(keys, dropna=False)[["correct", "count", "chance"]].sum().reset_index()
    pooled["relative"] = (pooled["bin"] + 0.5) / pooled["_bins"]
    pooled["accuracy"] = pooled["correct"] / pooled["count"]
    pooled["chance"] = pooled["chance"] / pooled["count"]
    ends = [wilson(int(k), int(n)) for k, n in zip(pooled["correct"], pooled["count"], strict=True)]
    pooled[["ci_low", "ci_high"]] = np.array(ends)
    return pooled.drop(columns="_bins")
