"""What the statistics accept; every refusal is one line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from ssm_retrieval.errors import UserError


def require(table: pd.DataFrame, columns: Iterable[str], name: str) -> None:
    """Check that a table has rows and these columns.

    Args:
        table: The table.
        columns: Names it must have.
        name: What the error calls the table.

    Raises:
        UserError: If the table is empty or lacks a column.
    """
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise UserError(
            f"{name} lacks the column(s) {', '.join(missing)}; it has {', '.join(map(str, table.columns))}"
        )
    if table.empty:
        raise UserError(f"{name} has no rows; check the folder it was read from and its filters")


def check_confidence(confidence: float) -> None:
    """Check that a confidence level lies between 0 and 1.

    Raises:
        UserError: If it does not.
    """
    if not 0 < confidence < 1:
        raise UserError(f"confidence {confidence} must lie between 0 and 1, say 0.95")


def numbers(values: Any, name: str = "values") -> np.ndarray:
    """`values` as a float64 array of shape (n,), n >= 1; an error calls them `name`.

    Raises:
        UserError: For another shape, no values, or values that are not finite.
    """
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not array.size:
        raise UserError(f"{name} must be a list of at least one number, not of shape {array.shape}")
    if not np.isfinite(array).all():
        raise UserError(f"{name} must be finite numbers; drop or repair the missing ones first")
    return array
