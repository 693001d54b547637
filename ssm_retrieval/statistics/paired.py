"""Paired tests: the same seed, data order and length under two architectures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics.inputs import numbers, require
from ssm_retrieval.statistics.intervals import bootstrap


@dataclass(frozen=True)
class PairedTest:
    """Does a value differ between a and b?

    Attributes:
        a: Level of the factor.
        b: Level it is compared with.
        n: Number of pairs.
        difference: Mean of a - b.
        low: Lower end of its bootstrap interval.
        high: Upper end.
        p: Exact two-sided sign-flip permutation test (`sign_flip_p`).
        p_wilcoxon: Wilcoxon's signed-rank test.
        p_smallest: The smallest p that n pairs allow, 2 / 2^n; with 5 pairs or fewer it is above 0.05.
    """

    a: str
    b: str
    n: int
    difference: float
    low: float
    high: float
    p: float
    p_wilcoxon: float
    p_smallest: float


@dataclass(frozen=True)
class SignTest:
    """Which of a and b gets there with less? n = a_first + b_first + ties + unknown.

    Attributes:
        a: Level of the factor.
        b: Level it is compared with.
        n: Number of pairs.
        a_first: Pairs in which a needed less.
        b_first: Pairs in which b needed less.
        ties: Pairs in which both needed the same.
        unknown: Pairs in which neither got there, or one did but needed more than the other had spent.
        p: Exact two-sided binomial test of a_first against b_first.
        p_smallest: The smallest p that these pairs allow, 2 / 2^(a_first + b_first).
    """

    a: str
    b: str
    n: int
    a_first: int
    b_first: int
    ties: int
    unknown: int
    p: float
    p_smallest: float


def _matched(
    table: pd.DataFrame, a: Any, b: Any, on: Sequence[str], columns: Sequence[str], factor: str
) -> pd.DataFrame:
    """One row for each combination of `on` that both levels have; columns end in `_a` and `_b`."""
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
    """Two-sided p-value of the mean, if the sign of every difference were a fair coin (Fisher 1935, § 21).

    Exact up to 13 differences (2^13 < 10,000 flips), otherwise from 10,000 random flips.

    Raises:
        UserError: For no differences, or missing ones.
    """
    data = numbers(differences, "differences")
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
    """Does `value` differ between two levels of `factor`, among rows that agree in the columns `on`?

    p is exact under the hypothesis that swapping a and b within a pair changes nothing. Pairs that share a
    seed but not a length count as independent.

    Args:
        table: One row per run; rows without a partner are left out.
        a: One level of the factor.
        b: The other.
        on: Columns that make a pair, such as seed and seq_len.
        value: Column that is compared.
        factor: Column of a and b.
        confidence: Level of the interval of the difference.
        seed: Seed of the bootstrap.

    Returns:
        Mean difference a - b, its interval and p-values.

    Raises:
        UserError: If nothing matches, a match is ambiguous, or `value` is censored (see `paired_sign_test`).
    """
    if value == "value" and "reached" in table and not table["reached"].all():
        raise UserError("value is censored where reached is False; use paired_sign_test")
    pairs = _matched(table, a, b, on, [value], factor)
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
    """Which of two levels gets there with less, where some runs never did (generalised sign test)?

    The order of a pair is known if both got there, or if one did with no more than the other spent. Ties and
    unknown pairs are counted but not tested, which is fair as long as both runs of a pair had the same
    budget.

    Args:
        table: One row per run; rows without a partner are left out.
        a: One level of the factor.
        b: The other.
        on: Columns that make a pair, such as seed and seq_len.
        value: Column of what was needed or spent.
        reached: Column, bool: whether the run got there.
        factor: Column of a and b.

    Returns:
        Counts of pairs and a p-value.

    Raises:
        UserError: As `paired_test`.
    """
    pairs = _matched(table, a, b, on, [value, reached], factor)
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
    """P-values corrected for m tests (Holm 1979), [m] float64 in the given order.

    The i-th smallest becomes max over j <= i of (m - j + 1) p_(j), at most 1.
    """
    data = numbers(p, "p")
    order = np.argsort(data)
    corrected = np.empty_like(data)
    corrected[order] = np.minimum(np.maximum.accumulate(data[order] * np.arange(len(data), 0, -1)), 1)
    return corrected
