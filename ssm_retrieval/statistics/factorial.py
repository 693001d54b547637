"""Main effects and two-way interactions of a full factorial: every combination of levels was run.

An effect is a difference of means of cells, and every cell counts alike, however many seeds it has. With
reference level 0, and bars for the mean over all levels of the other factors,

    main effect of level a of A     = mean(a) - mean(0)
    interaction of a of A, b of B   = [mean(a, b) - mean(0, b)] - [mean(a, 0) - mean(0, 0)]

In a 2 x 2 design the latter is the difference of differences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics.inputs import check_confidence, numbers, require

TIMES, MINUS = " x ", " - "  # in the names of terms and contrasts


@dataclass(frozen=True)
class Contrasts:
    """Effects as weights of cells.

    Attributes:
        labels: For each effect its term ("A" or "A x B") and its contrast ("a - 0" or "a - 0 x b - 0").
        weights: [effects, cells]; each row adds up to 0.
    """

    labels: list[tuple[str, str]]
    weights: np.ndarray


def factorial_effects(
    table: pd.DataFrame,
    factors: Mapping[str, Sequence[Any]],
    value: str = "value",
    reached: str = "reached",
    lower: str | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Effects on the mean of an outcome such as log2 of the steps to 0.95, where some runs never got there.

    A run that never got there enters with what it spent, so that its true value is larger. `effect` is
    therefore the effect on the mean of min(value, budget). `least` and `most` say between which numbers these
    runs' effect without budgets and without a grid of evaluations lies: `most` is inf where a run that counts
    positively never got there (`effect` is then a lower bound), `least` is -inf where one that counts
    negatively did not (an upper bound).

    The interval is for other seeds. It is a bootstrap within cells: of a cell's n values n - 1 are drawn with
    replacement, whose mean varies as that of n independent runs does (McCarthy and Snowden 1985). Its
    distances from the effect are then stretched by Student's quantile over the normal one, with the degrees
    of freedom of Welch and Satterthwaite, because few seeds do not know their scatter well. It has no width
    where no cell varies, as where no run got there; that is a lack of knowledge, and no certainty.

    Args:
        table: One row per run.
        factors: Name of each factor's column, and its levels; the first level is the reference.
        value: Column of what each run needed, or spent without getting there, on the scale of the means.
        reached: Column, bool: whether it got there.
        lower: Column of the value at the evaluation before, on the same scale, where -inf stands for no
            evaluation before; None if values are exact.
        confidence: Level of the intervals, between 0 and 1.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        One row per effect: term, contrast, effect, least, most; low and high, its interval; low_all and
        high_all, intervals that hold for all rows at once (Bonferroni); comparisons, the number of rows;
        runs and censored, how many runs count in it and how many of them never got there. Intervals are nan
        where a cell that counts has a single run.

    Raises:
        UserError: If a column is missing, a factor has fewer than two levels, a run has another level, a
            combination of levels has no run, or values are missing.
    """
    check_confidence(confidence)
    columns = [value, reached] + ([] if lower is None else [lower])
    groups = _groups(table, factors, columns)
    contrasts = _contrasts(factors)
    means, least, most, lost, counts, scatter = (np.full(len(groups), np.nan) for _ in range(6))
    drawn = np.full((resamples, len(groups)), np.nan)
    rng = np.random.default_rng(seed)
    for i, runs in enumerate(groups):
        values, got = numbers(runs[value], value), runs[reached].to_numpy(bool)
        below = values if lower is None else np.where(got, runs[lower].to_numpy(float), values)
        if np.isnan(below).any() or (below > values).any():
            raise UserError(f"{lower} must be at most {value} in every run; repair or drop the others")
        means[i], least[i] = values.mean(), below.mean()
        most[i] = np.where(got, values, np.inf).mean()
        lost[i], counts[i] = (~got).sum(), len(values)
        if len(values) > 1:
            scatter[i] = values.var(ddof=1) / len(values)
            drawn[:, i] = rng.choice(values, (resamples, len(values) - 1)).mean(axis=1)
    rows = []
    for (term, contrast), weights in zip(contrasts.labels, contrasts.weights, strict=True):
        used = weights != 0
        w, up = weights[used], weights[used] > 0
        effect, spread = float(means[used] @ w), drawn[:, used] @ w
        freedom = _freedom(w**2 * scatter[used], counts[used])
        ends = [
            effect + _stretch(freedom, level) * (_quantiles(spread, level) - effect)
            for level in _levels(confidence, len(contrasts.labels))
        ]
        rows.append(
            dict(
                term=term,
                contrast=contrast,
                effect=effect,
                least=float(np.where(up, least[used], most[used]) @ w),
                most=float(np.where(up, most[used], least[used]) @ w),
                **dict(zip(("low", "high", "low_all", "high_all"), np.concatenate(ends), strict=True)),
                comparisons=len(contrasts.labels),
                runs=int(counts[used].sum()),
                censored=int(lost[used].sum()),
            )
        )
    return pd.DataFrame(rows)


def factorial_shares(
    table: pd.DataFrame,
    factors: Mapping[str, Sequence[Any]],
    reached: str = "reached",
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Effects on the probability that a seed gets there.

    A bootstrap has no width where all seeds of each cell agree, which is common with five of them. So the
    interval is Price and Bonett's (2004) of a linear function of binomial proportions, which adds to the m
    cells that count 2 successes and 2 failures in all, 2 / m and 2 / m to each.

    Args:
        table: One row per run.
        factors: Name of each factor's column, and its levels; the first level is the reference.
        reached: Column, bool: whether the run got there.
        confidence: Level of the intervals, between 0 and 1.

    Returns:
        One row per effect: term, contrast, effect (a difference of shares), low and high, low_all and
        high_all, comparisons, runs, as in `factorial_effects`.

    Raises:
        UserError: As `factorial_effects`.
    """
    check_confidence(confidence)
    groups, contrasts = _groups(table, factors, [reached]), _contrasts(factors)
    k = np.array([runs[reached].to_numpy(bool).sum() for runs in groups])
    n = np.array([len(runs) for runs in groups])
    rows = []
    for (term, contrast), weights in zip(contrasts.labels, contrasts.weights, strict=True):
        used = weights != 0
        w, m = weights[used], int(used.sum())
        trials = n[used] + 4 / m
        share = (k[used] + 2 / m) / trials
        error = float(np.sqrt((w**2 * share * (1 - share) / trials).sum()))
        ends = [
            share @ w + error * stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
            for level in _levels(confidence, len(contrasts.labels))
        ]
        rows.append(
            dict(
                term=term,
                contrast=contrast,
                effect=float((k / n)[used] @ w),
                **dict(zip(("low", "high", "low_all", "high_all"), np.concatenate(ends), strict=True)),
                comparisons=len(contrasts.labels),
                runs=int(n[used].sum()),
            )
        )
    return pd.DataFrame(rows)


def _levels(confidence: float, comparisons: int) -> tuple[float, float]:
    """Levels of a row's interval and of one that holds for all rows at once."""
    return confidence, 1 - (1 - confidence) / comparisons


def _quantiles(values: np.ndarray, level: float) -> np.ndarray:
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2])


def _freedom(scatter: np.ndarray, counts: np.ndarray) -> float:
    """Degrees of freedom of a sum of variances of means (Welch 1947); inf if nothing varies."""
    below = float((scatter**2 / (counts - 1)).sum())  # nan if a cell has a single run
    return float(scatter.sum() ** 2 / below) if below else np.inf


def _stretch(freedom: float, level: float) -> float:
    """Student's quantile over the normal one."""
    return float(stats.t.ppf((1 + level) / 2, freedom) / stats.norm.ppf((1 + level) / 2))


def _groups(
    table: pd.DataFrame, factors: Mapping[str, Sequence[Any]], columns: Sequence[str]
) -> list[pd.DataFrame]:
    """The runs of every combination of levels, in the order of itertools.product."""
    require(table, [*factors, *columns], "table")
    for name, levels in factors.items():
        if len(set(levels)) < 2 or len(set(levels)) < len(levels):
            raise UserError(f"factor {name} needs two different levels or more, not {list(levels)}")
        others = [level for level in table[name].unique() if level not in set(levels)]
        if others:
            raise UserError(f"table has runs with {name} {others[0]}; name that level, or drop these runs")
    if not factors:
        raise UserError("factors names no column; give at least one factor and its levels")
    runs = {cell: part for cell, part in table.groupby(list(factors))}
    cells = list(product(*factors.values()))
    for cell in cells:
        if cell not in runs:
            words = ", ".join(f"{name} {level}" for name, level in zip(factors, cell, strict=True))
            raise UserError(f"table has no run with {words}; a full factorial needs every combination")
    return [runs[cell] for cell in cells]


def _contrasts(factors: Mapping[str, Sequence[Any]]) -> Contrasts:
    """Main effects, then two-way interactions; cells are in the order of itertools.product."""
    sizes = {name: len(levels) for name, levels in factors.items()}
    labels, weights = [], []
    for names in [*combinations(factors, 1), *combinations(factors, 2)]:
        for chosen in product(*(range(1, sizes[name]) for name in names)):
            level = dict(zip(names, chosen, strict=True))
            row = np.ones(1)
            for name, size in sizes.items():  # a difference for the factors of the term, a mean for the rest
                one = np.full(size, 1 / size)
                if name in level:
                    one = np.eye(size)[level[name]] - np.eye(size)[0]
                row = np.kron(row, one)
            told = (f"{factors[name][at]}{MINUS}{factors[name][0]}" for name, at in level.items())
            labels.append((TIMES.join(names), TIMES.join(told)))
            weights.append(row)
    return Contrasts(labels, np.array(weights))
