"""Draws the tables of `probes.suite.updates`: what tokens do to the state, by role and around the target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.plots.common import error_bars, families, plain_log
from probes.suite.common import WEIGHTS
from ssm_retrieval.style import NAMES, family_colors, legend, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTITIES = {  # name: axis label
    "write": "write norm |dt x B|",
    "decay": "mean decay exp(dt A)",
    "relative": "relative update\n|h_t - h_{t-1}| / |h_{t-1}|",
    "horizon": "horizon (tokens to 1/e)",
}


def draw_roles(table: pd.DataFrame) -> Figure:
    """Layer x role: filled trained with intervals, hollow untrained; a triangle outlasts the sequence."""
    table, names = table[table["part"] == "role"], families(table)
    colors = {name: color for name, color in role_colors().items() if name in set(table["role"])}
    figure, axes = panels(len(QUANTITIES), len(names), size=(3.8, 2.1), sharex="col")
    for i, (quantity, label) in enumerate(QUANTITIES.items()):
        for j, family in enumerate(names):
            ax = axes[i, j]
            mine = table[(table["family"] == family) & (table["quantity"] == quantity)]
            layers = sorted(mine["layer"].unique())
            for k, (name, color) in enumerate(colors.items()):
                shift = (k - (len(colors) - 1) / 2) * 0.7 / len(colors)
                for weights in WEIGHTS:
                    part = mine[(mine["role"] == name) & (mine["weights"] == weights)].sort_values("layer")
                    part = part.assign(x=[layers.index(v) + shift for v in part["layer"]])
                    endless = part[np.isinf(part["value"])]
                    ax.plot(
                        endless["x"],
                        np.full(len(endless), 0.97),
                        "^",
                        color=color,
                        ms=4,
                        mfc=color if weights == "trained" else "none",
                        transform=ax.get_xaxis_transform(),
                    )
                    part = part[np.isfinite(part["value"])]
                    style: Any = (
                        dict(yerr=error_bars(part), capsize=2, ms=5)
                        if weights == "trained"
                        else dict(mfc="none", ms=4, alpha=0.7)
                    )
                    ax.errorbar(part["x"], part["value"], fmt="o", color=color, lw=1, **style)
            ax.set_xticks(range(len(layers)), layers)
            ax.grid(axis="x", visible=False)
            finite = mine["value"][np.isfinite(mine["value"])]
            if quantity != "decay" and (finite > 0).any():
                ax.set_yscale("log")
                plain_log(ax.yaxis)
            if j == 0:
                ax.set_ylabel(label, fontsize=8)
            if i == 0:
                ax.set_title(NAMES[family])
            if i == len(QUANTITIES) - 1:
                ax.set_xlabel("layer")
    looks: dict[str, dict[str, Any]] = {
        name: dict(color=color, marker="o", ls="") for name, color in colors.items()
    }
    legend(figure, looks | {"untrained weights": dict(color="0.3", marker="o", mfc="none", ls="")})
    return figure


def draw_aligned(table: pd.DataFrame) -> Figure:
    """A panel per layer: the relative update around the target, 1 being the mean at the same positions."""
    table, names = table[table["part"] == "aligned"], families(table)
    count = max(table.loc[table["family"] == name, "layer"].nunique() for name in names)
    figure, axes = panels(len(names), count, size=(2.4, 2.3), sharex=True, sharey="row")
    for ax in axes.flat:
        ax.set_axis_off()
    for i, family in enumerate(names):
        mine = table[table["family"] == family]
        for j, (layer, rows) in enumerate(mine.groupby("layer")):
            ax = axes[i, j]
            ax.set_axis_on()
            ax.axhline(1, color="0.4", ls=":", lw=1)
            ax.axvline(0, color="0.4", ls="--", lw=1)
            for weights, color in zip(WEIGHTS, (family_colors()[family], "0.5"), strict=True):
                part = rows[rows["weights"] == weights].sort_values("offset")
                ax.plot(part["offset"], part["value"], color=color, lw=1.6 if weights == "trained" else 1)
                ax.fill_between(part["offset"], part["low"], part["high"], color=color, alpha=0.2, lw=0)
            ax.set_title(f"{NAMES[family]}, layer {layer}", fontsize=9)
            ax.set_xlabel("tokens from the target", fontsize=9)
            ax.tick_params(labelbottom=True)
            if j == 0:
                ax.set_ylabel("relative update /\nmean at that position")
    looks: dict[str, dict[str, Any]] = {NAMES[name]: dict(color=family_colors()[name]) for name in names}
    looks |= {"untrained weights": dict(color="0.5"), "any token there": dict(color="0.4", ls=":")}
    legend(figure, looks)
    return figure


def role_colors() -> dict[str, Any]:
    import seaborn

    palette = seaborn.color_palette("dark", 10)
    order = ("target", "distractor", "query", "query_marker", "bos", "task", "separator", "answer")
    return dict(
        zip(order, (palette[3], palette[7], palette[0], palette[9], palette[8], *palette[4:7]), strict=True)
    )
