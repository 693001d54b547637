"""Draws the tables of `probes.suite.lens`: what the model's own head reads after each block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.plots.common import families
from probes.suite.common import WEIGHTS
from ssm_retrieval.style import NAMES, family_colors, legend, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {"accuracy": "accuracy of the lens", "log_prob": "log-probability of the answer (nats)"}


def draw(table: pd.DataFrame) -> Figure:
    """Accuracy and log-probability of the answer by layer, families together, untrained weights dashed."""
    figure, axes = panels(1, 2, size=(3.8, 3.2))
    for ax, (part, label) in zip(axes[0], UNITS.items(), strict=True):
        mine = table[table["part"] == part]
        for family in families(mine):
            for weights in WEIGHTS:
                line = mine[(mine["family"] == family) & (mine["weights"] == weights)].sort_values("layer")
                look: dict[str, Any] = dict(color=family_colors()[family])
                look |= dict(marker="o", ms=4) if weights == "trained" else dict(ls="--", lw=1, alpha=0.7)
                ax.plot(line["layer"], line["value"], **look)
                ax.fill_between(
                    line["layer"], line["low"], line["high"], color=look["color"], alpha=0.15, lw=0
                )
        ax.axhline(mine["chance"].iloc[0], color="0.4", ls=":", lw=1)
        ax.set(xlabel="blocks passed (0 = embedding)", ylabel=label)
        ax.set_xticks(range(int(mine["layer"].max()) + 1))
    axes[0, 0].set_ylim(-0.03, 1.03)
    looks: dict[str, dict[str, Any]] = {
        NAMES[name]: dict(color=family_colors()[name], marker="o") for name in families(table)
    }
    looks |= {"untrained weights": dict(color="0.3", ls="--"), "chance": dict(color="0.4", ls=":")}
    legend(figure, looks)
    return figure
