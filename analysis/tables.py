"""Tables and numbers as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from ssm_retrieval.statistics import (
    agreement,
    median_bounds,
    median_interval,
    share_interval,
    summarise_seeds,
)


def fill(text: str, tables: Mapping[str, str]) -> str:
    """The document with `tables[NAME]` between its markers `<!-- NAME -->` and `<!-- /NAME -->`."""
    for name, made in tables.items():
        before, rest = text.split(f"<!-- {name} -->")
        after = rest.split(f"<!-- /{name} -->")[1]
        text = f"{before}<!-- {name} -->\n{made}\n<!-- /{name} -->{after}"
    return text


def between(value: Any, low: Any, high: Any, digits: int = 3) -> str:
    """Write a number with its interval.

    Args:
        value: The number.
        low: Lower end of its interval.
        high: Upper end.
        digits: Decimal places.

    Returns:
        Text such as "0.42 [0.40, 0.44]".
    """
    # The last bits depend on the order of a sum, and would decide how a half is rounded
    value, low, high = (round(float(x), 10) for x in (value, low, high))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def by_seed(values: Iterable[Any], digits: int = 3) -> str:
    """A number for each seed, in their order: "0.866, 0.930, 0.970"."""
    return ", ".join(f"{value:.{digits}f}" for value in values)


def share(k: Any, n: Any) -> str:
    """How many seeds out of how many, with Clopper and Pearson's interval: "2 of 3 [0.09, 0.99]"."""
    low, high = share_interval(int(k), int(n))
    return f"{k} of {n} [{low:.2f}, {high:.2f}]"


def seeds(accuracy: Any, reached: Any) -> str:
    """What the seeds of a cell came to.

    Args:
        accuracy: Their final accuracies, [n].
        reached: Whether each got there, [n] bool.

    Returns:
        How many got there, with Clopper and Pearson's interval; then the mean accuracy with its range or, of
        as many seeds as `ssm_retrieval.statistics.one_mode` asks for, its 95 % interval. Such as "2 of 3
        [0.09, 0.99]; 0.774 (0.402 to 0.990)"; a single seed has no range.
    """
    found = summarise_seeds(accuracy, reached)
    if found.student:
        mean = between(found.mean, found.low, found.high)
    else:
        mean = f"{found.mean:.3f}" + (f" ({found.low:.3f} to {found.high:.3f})" if found.n > 1 else "")
    return f"{share(found.reached, found.n)}; {mean}"


def cost(outcomes: pd.DataFrame) -> str:
    """What runs needed until they got there, as far as their evaluations and their number tell.

    Args:
        outcomes: Columns lower, value and reached of `ssm_retrieval.training.outcomes.examples_to_threshold`.

    Returns:
        Between which evaluations the median lies, then the interval of the median and its confidence: "400 to
        500 [300, ∞] 75 %". "> 500" means that half of the runs never got there.
    """
    columns = (outcomes["lower"], outcomes["value"], outcomes["reached"])
    (after, by), (low, high, level) = median_bounds(*columns), median_interval(*columns)
    median = f"> {_count(after)}" if by == float("inf") else f"{_count(after)} to {_count(by)}"
    return f"{median} [{_count(low)}, {_count(high)}] {100 * level:.0f} %" if len(outcomes) > 1 else median


def agreed(differences: Iterable[Any], what: str = "differences are compared on this page") -> str:
    """Sentences on how many comparisons come out alike in every seed, and how many would by chance.

    Args:
        differences: For each comparison the differences of its seeds.
        what: Subject and verb behind their number.

    Returns:
        The sentences, without decimal numbers.
    """
    found = agreement(differences)
    return (
        f"{found.comparisons} {what}. {found.same} of them have the same sign in all {found.seeds} seeds; "
        f"coins would give {found.expected:.0f}. Nothing is corrected for that, and no single comparison of "
        f"{found.seeds} seeds can have p below 1/{1 / found.p_smallest:.0f}."
    )


def _count(value: float) -> str:
    return "∞" if value == float("inf") else f"{value:,.0f}"
