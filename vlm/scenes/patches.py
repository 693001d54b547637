"""Which patches of a picture show which object."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vlm.scenes.scene import Scene

LEAST = 0.1  # share of a patch that an object must cover


def owners(scene: Scene, side: int) -> npt.NDArray[np.int64]:
    """Return the object that each patch belongs to: the one that covers most of it, if any covers a tenth.

    Args:
        scene: The scene.
        side: Patches along one side.

    Returns:
        (side, side) int64, numbers of `scene.objects`; -1 = none.
    """
    best, belongs = np.full((side, side), LEAST), np.full((side, side), -1)
    for k, item in enumerate(scene.objects):
        cover = coverage([value / scene.size for value in item.box], side)
        belongs[cover > best] = k
        best = np.maximum(best, cover)
    return belongs


def coverage(box: Sequence[float], side: int) -> npt.NDArray[np.float64]:
    """Return the share of each patch that a box covers.

    Args:
        box: x_min, y_min, x_max, y_max, as shares of the image.
        side: Patches along one side.

    Returns:
        (side, side), 0 .. 1.
    """
    x0, y0, x1, y1 = box
    edges = np.arange(side) / side
    across = np.clip(np.minimum(edges + 1 / side, x1) - np.maximum(edges, x0), 0, None) * side
    down = np.clip(np.minimum(edges + 1 / side, y1) - np.maximum(edges, y0), 0, None) * side
    return down[:, None] * across
