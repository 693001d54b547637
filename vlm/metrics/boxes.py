"""Overlap of boxes; `vlm.prompts.parse_box` reads boxes from answers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssm_retrieval.errors import UserError

_ROUNDING = 1e-12  # of an overlap


def iou(predicted: ArrayLike, gold: ArrayLike) -> NDArray[np.float64]:
    """Return the intersection over union of boxes x_min, y_min, x_max, y_max.

    A predicted box with corners out of order, without area or with a NaN (an answer that is no box) scores 0.

    Args:
        predicted: (N, 4).
        gold: (N, 4).

    Returns:
        (N,) float64.

    Raises:
        UserError: If a shape is another one, or a gold box is no box.
    """
    p, g = np.asarray(predicted, np.float64), np.asarray(gold, np.float64)
    if p.shape != g.shape or p.ndim != 2 or p.shape[1] != 4:
        raise UserError(f"predicted {p.shape} and gold {g.shape} must both be (N, 4)")
    if not np.all((g[:, 2:] > g[:, :2]) & np.isfinite(g[:, 2:])):
        raise UserError("gold has a box whose corners are not in order x_min, y_min, x_max, y_max")
    valid = np.all(np.isfinite(p), axis=1) & np.all(p[:, 2:] > p[:, :2], axis=1)
    p = np.where(valid[:, None], p, g)
    overlap = np.clip(np.minimum(p[:, 2:], g[:, 2:]) - np.maximum(p[:, :2], g[:, :2]), 0, None)
    shared = overlap.prod(axis=1)
    union = (p[:, 2:] - p[:, :2]).prod(axis=1) + (g[:, 2:] - g[:, :2]).prod(axis=1) - shared
    return np.where(valid, shared / union, 0.0)


def above_half(overlaps: ArrayLike) -> NDArray[np.bool_]:
    """Whether overlaps are above one half, where one of exactly one half is not, whatever its rounding.

    0.28 x 100 is a little more than 28, so an exact half can come out above one. Boxes printed with two
    decimals in images of up to 1,000 pixels a side cannot be that near to one half without being one half.

    Args:
        overlaps: What `iou` gives.

    Returns:
        Truth values of the same shape.
    """
    return np.asarray(overlaps, np.float64) > 0.5 + _ROUNDING
