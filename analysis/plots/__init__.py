"""Figures from tables: one module a probe, and `sweep` for the results of runs.

FIGURES says what `python -m analysis.figures RUN` draws of each probe: suffix of the file's name -> function
from the table of all families (`probes.run.tables`) to a figure, or None where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from analysis.plots import attention, capacity, erasure, knockout, lens, linear, patch, retention, updates
from probes.contrast_pairs import KINDS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

FIGURES: Mapping[str, Mapping[str, Callable[[pd.DataFrame], Figure | None]]] = {
    "updates": {"": updates.draw_roles, "_aligned": updates.draw_aligned},
    "retention": {"": retention.draw_curves, "_maps": retention.draw_maps},
    "erasure": {"": erasure.draw, "_curves": erasure.draw_curves, "_maps": erasure.draw_maps},
    "capacity": {"": capacity.draw, "_projection": capacity.draw_projection},
    "linear": {"": linear.draw_lags, "_answer": linear.draw_answer},
    "patch": {f"_{kind}": partial(patch.draw, kind=kind) for kind in KINDS},
    "attention": {"": attention.draw_scores, "_maps": attention.draw_maps},
    "lens": {"": lens.draw},
    "knockout": {"": knockout.draw},
}
