"""What a few seeds say: how many got there, how their accuracies lie, how often their signs agree by chance.

Training either finds retrieval or does not, so accuracies over seeds tend to have two modes. A mean of such
values is no typical value, and Student's interval of it is too narrow (`mean_interval`). What holds for any
number of seeds is k of n with the interval of Clopper and Pearson.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics.inputs import numbers
from ssm_retrieval.statistics.intervals import mean_interval, share_interval

APART = 0.2  # accuracies that differ by more, with none between them, are of two modes
RARE = 0.1  # a mode that fewer seeds fall into may stay unseen
MISSED = 0.05  # probability with which it may


@dataclass(frozen=True)
class SeedSummary:
    """Accuracies of the seeds of one cell.

    Attributes:
        n: Number of seeds.
        reached: How many of them got there.
        share_low: Lower end of Clopper and Pearson's interval of the share of seeds that get there.
        share_high: Upper end.
        mean: Mean accuracy.
        low: Lowest accuracy or, if `student`, the lower end of the interval of the mean.
        high: Highest accuracy or, if `student`, the upper end.
        student: Whether low and high are Student's interval; else they are the range.
    """

    n: int
    reached: int
    share_low: float
    share_high: float
    mean: float
    low: float
    high: float
    student: bool


def one_mode(accuracy: Any) -> bool:
    """Whether accuracies over seeds can be summed up by a mean with Student's interval.

    Two things are needed. No gap between neighbouring values is wider than `APART`. And there are so many
    seeds, 29, that a second mode would have shown itself: one that holds a share of at least `RARE` of all
    seeds stays unseen with a probability of at most `MISSED`, (1 - RARE)^n <= MISSED. Fewer seeds cannot tell
    one mode from two, even if all of them are equal: three seeds learn in 73 % of cases where nine of ten do.

    Args:
        accuracy: [n] numbers, a seed each.

    Returns:
        True if both hold.

    Raises:
        UserError: For no values, or missing ones.
    """
    values = np.sort(numbers(accuracy, "accuracy"))
    enough = (1 - RARE) ** len(values) <= MISSED
    return bool(enough and (np.diff(values) <= APART).all())


def summarise_seeds(accuracy: Any, reached: Any, confidence: float = 0.95) -> SeedSummary:
    """Sum up the seeds of a cell: k of n, and a mean with what `one_mode` lets stand beside it.

    Args:
        accuracy: [n] final accuracies, a seed each.
        reached: [n] bool; whether the seed got there.
        confidence: Level of the intervals, between 0 and 1.

    Returns:
        The summary.

    Raises:
        UserError: For no seeds, missing values, unequal lengths, or a confidence outside (0, 1).
    """
    values, flags = numbers(accuracy, "accuracy"), np.asarray(reached)
    if flags.shape != values.shape or not np.isin(flags, (0, 1)).all():
        raise UserError(f"reached must hold one truth value for each of the {len(values)} accuracies")
    k, n = int(flags.sum()), len(values)
    share_low, share_high = share_interval(k, n, confidence)
    mean, low, high = mean_interval(values, confidence, bounds=(0, 1))
    student = one_mode(values)
    if not student:
        low, high = float(values.min()), float(values.max())
    return SeedSummary(n, k, share_low, share_high, mean, low, high, student)


@dataclass(frozen=True)
class Agreement:
    """Comparisons of which every seed has a sign.

    Attributes:
        comparisons: How many there are.
        same: In how many of them all seeds have the same sign.
        expected: In how many coins would agree, on average.
        seeds: Seeds of the smallest comparison.
        p_smallest: The smallest two-sided p that a single comparison of so many seeds can have, 2 / 2^seeds.
    """

    comparisons: int
    same: int
    expected: float
    seeds: int
    p_smallest: float


def agreement(differences: Iterable[Any]) -> Agreement:
    """Count the comparisons that come out alike "in every seed", beside what chance alone would give.

    If nothing differs, the n signs of a comparison agree with probability 2 / 2^n: once in four for three
    seeds. `expected` adds these up over all comparisons, and holds even where they share runs. A difference
    of 0 agrees with nothing.

    Args:
        differences: For each comparison the differences of its seeds, [n] numbers.

    Returns:
        The counts.

    Raises:
        UserError: For no comparison, one without seeds, or missing values.
    """
    found = [numbers(one, "differences") for one in differences]
    if not found:
        raise UserError("differences holds no comparison; give one list of seeds for each")
    same = sum(bool((one > 0).all() or (one < 0).all()) for one in found)
    expected = sum(2.0 ** (1 - len(one)) for one in found)
    seeds = min(map(len, found))
    return Agreement(len(found), same, expected, seeds, 2.0 ** (1 - seeds))
