"""Draws the tables of `probes.suite.patch`: causal tracing, layers by tokens, each map above its control."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.plots.common import SITE_WORDS, families
from probes.patch_sites import SITES
from probes.suite.patch import column_key, row_key
from ssm_retrieval.style import NAMES, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANSWERS = 0.5  # accuracy of clean runs below which a share of the logit difference says nothing
FADED = 0.2  # opacity of maps that say nothing
CONTROLS = {"": "patch", "unrelated": "control: unrelated run"}
EFFECT = "effect: share of the logit difference restored"


def tracing_table(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The rows of `draw`: patches at single places, of pairs of runs that differ in `kind`, and controls."""
    rows = table[(table["part"] == kind) & (table["role"] != "everything")]
    return rows[rows["site"].isin(SITES) & rows["control"].isin(CONTROLS)]


def answers(part: pd.DataFrame) -> bool:
    """Whether the model answers the clean runs, without which the shares mean nothing."""
    return bool(part["accuracy_clean"].iloc[0] >= ANSWERS)


def tracing_grid(part: pd.DataFrame) -> tuple[np.ndarray, list[Any], list[Any]]:
    """Put the rows of one family, site and control together as a map.

    Returns:
        Values [rows, columns], nan where there is none; the sort keys of rows and of columns, each a tuple
        whose last item is the label.
    """
    records = part.to_dict("records")
    rows, columns = sorted({row_key(r) for r in records}), sorted({column_key(r) for r in records})
    grid = np.full((len(rows), len(columns)), np.nan)
    for r in records:
        grid[rows.index(row_key(r)), columns.index(column_key(r))] = r["value"]
    return grid, rows, columns


def draw(table: pd.DataFrame, kind: str) -> Figure:
    """Layer x tokens, families side by side: for each site the patches, and below them their control."""
    table = tracing_table(table, kind)
    names = families(table)
    sites = [site for site in SITES if (table["site"] == site).any()]
    shown = [(site, *control) for site in sites for control in CONTROLS.items()]
    most = max(
        len(tracing_grid(part)[1]) for _, part in table[table["control"] == ""].groupby(["family", "site"])
    )
    size = (4.3, max(1.9, 0.14 * most + 1.2))
    figure, axes = panels(len(shown), len(names), size=size)
    for i, (site, control, title) in enumerate(shown):
        for j, family in enumerate(names):
            ax = axes[i, j]
            mine = table[(table["family"] == family) & (table["site"] == site)]
            part = mine[mine["control"] == control]
            if part.empty:
                ax.set_axis_off()
                continue
            grid, rows, columns = tracing_grid(part)
            image = ax.imshow(grid, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto", interpolation="nearest")
            ax.set_xticks(range(len(columns)), [c[2] for c in columns], rotation=90, fontsize=7)
            step = max(1, len(rows) // 16)
            ax.set_yticks(range(0, len(rows), step), [r[2] for r in rows[::step]], fontsize=8)
            named = sum(c[0] == 0 for c in columns)
            ax.axvline(named - 0.5, color="0.3", lw=1)
            ax.grid(False)
            if not answers(part):
                image.set_alpha(FADED)
                said = "shares mean nothing: the model does\nnot answer the clean run"
                ax.text(0.5, 0.5, said, transform=ax.transAxes, ha="center", va="center", fontsize=9)
            ax.set_title(f"{NAMES[family]}, {SITE_WORDS[site]}: {title}", fontsize=9)
            ax.set_ylabel("layer.head" if site == "head" else "layer", fontsize=8)
    figure.suptitle(f"clean and corrupted run differ in the {kind}", fontsize=10)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(-1, 1), "RdBu_r")
    bar = figure.colorbar(scale, ax=axes, shrink=0.6, aspect=30)
    bar.set_label(EFFECT, fontsize=9)
    return figure
