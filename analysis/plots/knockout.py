"""Draws the table of `probes.suite.knockout`: what accuracy drops by without each part, and without sets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from analysis.plots.common import families, family_looks
from ssm_retrieval.style import NAMES, NEUTRAL, family_colors, legend, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNIT = "drop of accuracy"


def parts_table(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the left panel: every part, in the order of layers; column at is where it stands."""
    rows = table[table["part"] == "part"].sort_values(["family", "layer", "number"], kind="stable")
    return rows.assign(at=rows.groupby("family").cumcount())


def draw(table: pd.DataFrame) -> Figure:
    """Each part taken away by itself (left), and the responsible ones at once beside random sets (right)."""
    figure, axes = panels(1, 2, size=(4.2, 3.2), sharey=True)
    left, right = axes[0]
    singles, names = parts_table(table), families(table)
    for i, family in enumerate(names):
        color = family_colors()[family]
        mine = singles[singles["family"] == family]
        chosen = mine["chosen"].astype(bool)
        left.vlines(mine["at"], mine["low"], mine["high"], color=color, lw=1)
        left.plot(mine["at"][~chosen], mine["value"][~chosen], "o", color=color, mfc="white", ms=4)
        left.plot(mine["at"][chosen], mine["value"][chosen], "o", color=color, ms=4)
        sets = table[(table["family"] == family) & (table["part"] == "set")]
        control = table.loc[(table["family"] == family) & (table["part"] == "control"), "value"]
        right.plot([i] * len(control), control, "o", color=NEUTRAL, alpha=0.4, ms=4, mew=0)
        right.vlines([i + 0.15] * len(sets), sets["low"], sets["high"], color=color, lw=1.5)
        right.plot([i + 0.15] * len(sets), sets["value"], "o", color=color, ms=6)
    left.set(xlabel="part (head or group of channels), by layer", ylabel=f"{UNIT} without it")
    right.set_xticks(range(len(names)), [NAMES[name] for name in names], rotation=20)
    right.set(xlim=(-0.5, len(names) - 0.2), xlabel="responsible parts at once, beside random sets")
    for ax in (left, right):
        ax.axhline(0, color="0.4", lw=1, ls=":")
    looks = family_looks(names, marker="o", ls="")
    looks["not called responsible"] = dict(color="0.4", marker="o", mfc="white", ls="")
    looks["a random set of as many others"] = dict(color=NEUTRAL, marker="o", alpha=0.4, ls="")
    legend(figure, looks)
    return figure
