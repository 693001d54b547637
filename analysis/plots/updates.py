"""Draws the tables of `probes.suite.updates`: what tokens do to the state, by role and around the target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.plots.common import (
    BELOW,
    error_bars,
    families,
    family_looks,
    layer_panels,
    plain_log,
    role_words,
    shown,
)
from ssm_retrieval.style import CONTROLS, FAMILIES, NAMES, NEUTRAL, family_colors, legend, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTITIES = {  # name: words, formula or unit
    "write": ("write norm", "|dt x B|"),
    "decay": ("mean decay", "exp(dt A)"),
    "relative": ("relative update", "|h_t - h_{t-1}| / |h_{t-1}|"),
    "horizon": ("horizon", "tokens to 1/e"),
}
LINEAR = "decay"  # the quantity between 0 and 1; the others have logarithmic axes
ENDLESS = "no horizon ends\nwithin the sequence"


def role_table(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `draw_roles`: a series per quantity, family, role and weights, sorted by layer.

    An infinite horizon is one that outlasts the sequence.
    """
    order: Any = dict(quantity=QUANTITIES, family=FAMILIES, role=role_colors(), weights=BELOW)
    return shown(table, ["layer"], part=["role"], **order)


def aligned_table(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `draw_aligned`: a series per family, layer and weights, sorted by offset."""
    layers = sorted(table["layer"].unique())
    return shown(table, ["offset"], part=["aligned"], family=FAMILIES, layer=layers, weights=BELOW)


def draw_roles(table: pd.DataFrame) -> Figure:
    """Layer x role: filled trained with intervals, hollow untrained; a triangle outlasts the sequence."""
    table = role_table(table)
    names = families(table)
    colors = {name: color for name, color in role_colors().items() if name in set(table["role"])}
    figure, axes = panels(len(QUANTITIES), len(names), size=(3.8, 2.1), sharex="col")
    for i, (quantity, label) in enumerate(QUANTITIES.items()):
        for j, family in enumerate(names):
            ax = axes[i, j]
            mine = table[(table["family"] == family) & (table["quantity"] == quantity)]
            layers = sorted(mine["layer"].unique())
            for k, (name, color) in enumerate(colors.items()):
                shift = (k - (len(colors) - 1) / 2) * 0.7 / len(colors)
                for weights in BELOW:
                    part = mine[(mine["role"] == name) & (mine["weights"] == weights)]
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
            if finite.empty and np.isinf(mine["value"]).any():  # ticks of an axis without values mean nothing
                ax.text(0.5, 0.5, ENDLESS, transform=ax.transAxes, ha="center", va="center", fontsize=8)
                ax.set_yticks([])
            elif quantity != LINEAR and (finite > 0).any():
                ax.set_yscale("log")
                plain_log(ax.yaxis)
            if j == 0:
                ax.set_ylabel(f"{label[0]}\n{label[1]}", fontsize=8)
            if i == 0:
                ax.set_title(NAMES[family])
            if i == len(QUANTITIES) - 1:
                ax.set_xlabel("layer")
    looks: dict[str, dict[str, Any]] = {
        role_words(name): dict(color=color, marker="o", ls="") for name, color in colors.items()
    }
    looks["untrained weights"] = dict(color=NEUTRAL, marker="o", mfc="none", ls="")
    if np.isinf(table["value"]).any():
        looks["outlasts the sequence"] = dict(color=NEUTRAL, marker="^", ls="")
    legend(figure, looks)
    return figure


def draw_aligned(table: pd.DataFrame) -> Figure:
    """A panel per layer: the relative update around the target, 1 being the mean at the same positions."""
    table = aligned_table(table)
    names = families(table)
    figure, axes = layer_panels(table, 1, size=(2.4, 2.3))
    for i, family in enumerate(names):
        mine = table[table["family"] == family]
        for j, (layer, rows) in enumerate(mine.groupby("layer")):
            ax = axes[i, j]
            ax.set_axis_on()
            ax.axhline(1, **CONTROLS["chance"])  # of an update that depends on the position only
            ax.axvline(0, color=NEUTRAL, ls="-", lw=1)
            for weights, part in rows.groupby("weights", sort=False):
                look: dict[str, Any] = dict(color=family_colors()[family], lw=1.6)
                look = look if weights == "trained" else CONTROLS["untrained weights"]
                ax.plot(part["offset"], part["value"], **look)
                ax.fill_between(
                    part["offset"], part["low"], part["high"], color=look["color"], alpha=0.2, lw=0
                )
            ax.set_title(f"{NAMES[family]}, layer {layer}", fontsize=9)
            ax.set_xlabel("tokens from the target", fontsize=9)
            ax.tick_params(labelbottom=True)
            if j == 0:
                ax.set_ylabel("relative update /\nmean at that position")
    looks = family_looks(names) | {"untrained weights": CONTROLS["untrained weights"]}
    legend(figure, looks | {"any token there": CONTROLS["chance"]})
    return figure


def role_colors() -> dict[str, Any]:
    """(r, g, b) of every role of a token, in the order of the legend."""
    import seaborn

    palette = seaborn.color_palette("dark", 10)
    order = ("target", "distractor", "query", "query_marker", "bos", "task", "separator", "answer")
    return dict(
        zip(order, (palette[3], palette[7], palette[0], palette[9], palette[8], *palette[4:7]), strict=True)
    )
