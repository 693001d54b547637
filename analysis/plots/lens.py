"""Draws the tables of `probes.suite.lens`: what the model's own head reads after each block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.plots.common import BELOW, SHARES, families, family_looks, shown
from ssm_retrieval.style import CONTROLS, FAMILIES, family_colors, legend, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {"accuracy": "accuracy of the lens", "log_prob": "log-probability of the answer (nats)"}
DEPTH = "blocks passed (0 = embedding)"


def lens_table(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the figure: a series per part, family and weights, sorted by layer."""
    return shown(table, ["layer"], part=UNITS, family=FAMILIES, weights=BELOW)


def draw(table: pd.DataFrame) -> Figure:
    """Accuracy and log-probability of the answer by layer, families together, untrained weights dotted."""
    table = lens_table(table)
    figure, axes = panels(1, 2, size=(3.8, 3.2))
    for ax, (part, label) in zip(axes[0], UNITS.items(), strict=True):
        mine = table[table["part"] == part]
        for (family, weights), line in mine.groupby(["family", "weights"], sort=False):
            look: dict[str, Any] = dict(marker="o", ms=4)
            if weights == "untrained":
                look = CONTROLS["untrained weights"] | dict(marker="o", ms=4, mfc="none")
            look |= dict(color=family_colors()[str(family)])
            ax.plot(line["layer"], line["value"], **look)
            ax.fill_between(line["layer"], line["low"], line["high"], color=look["color"], alpha=0.15, lw=0)
        for chance in sorted(set(mine["chance"].round(6))):
            ax.axhline(chance, **CONTROLS["chance"])
        ax.set(xlabel=DEPTH, ylabel=label)
        ax.set_xticks(range(int(mine["layer"].max()) + 1))
    axes[0, 0].set_ylim(*SHARES)
    looks = family_looks(families(table), marker="o")
    looks["untrained weights"] = CONTROLS["untrained weights"] | dict(marker="o", mfc="none")
    legend(figure, looks | {"chance": CONTROLS["chance"]})
    return figure
