"""Tables and numbers as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ssm_retrieval.statistics import share_interval


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
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def by_seed(values: Iterable[Any], digits: int = 3) -> str:
    """A number for each seed, in their order: "0.866, 0.930, 0.970"."""
    return ", ".join(f"{value:.{digits}f}" for value in values)


def share(k: Any, n: Any) -> str:
    """How many seeds out of how many, with Clopper and Pearson's interval: "2 of 3 [0.09, 0.99]"."""
    low, high = share_interval(int(k), int(n))
    return f"{k} of {n} [{low:.2f}, {high:.2f}]"
