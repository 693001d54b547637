"""Draws the tables of `probes.suite.attention`: scores by head, and the map of each layer's best head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.plots.common import (
    BELOW,
    SHARES,
    error_bars,
    families,
    family_looks,
    map_panels,
    shown,
    target_cell,
)
from ssm_retrieval.style import FAMILIES, NAMES, NEUTRAL, family_colors, legend, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTITIES = {
    "retrieval": "attention from the answer's\nposition to the target",
    "induction": "attention to the token after\nthe previous occurrence",
    "previous": "attention to the\nprevious token",
}
BESIDE = {"untrained": 0.15, "trained": -0.1}  # where points stand beside their place
UNIFORM = dict(color=NEUTRAL, marker="_", ms=14, mew=1.5, ls="")


def score_table(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `draw_scores`: a series per quantity, family and weights, sorted by layer and head.

    Column label names the head (layer.head, or the layer where every layer has one), column place is where it
    stands on the axis, counted from 0 within the family.
    """
    order: Any = dict(quantity=QUANTITIES, family=FAMILIES, weights=BELOW)
    rows = shown(table, ["layer", "head"], part=["score"], **order)
    single = rows.groupby("family")["head"].transform("nunique") == 1
    heads = rows["layer"].map("{:g}".format) + "." + rows["head"].map("{:g}".format)
    rows = rows.assign(label=heads.where(~single, rows["layer"].map("{:g}".format)))
    place = rows.groupby("family")["label"].transform(lambda labels: labels.factorize()[0])
    return rows.assign(place=place)


def head_words(table: pd.DataFrame, part: pd.DataFrame) -> str:
    """Which head a layer's map shows, in words; a family without heads has the mean over channels."""
    scores = table[(table["part"] == "score") & (table["family"] == part["family"].iloc[0])]
    return f"head {part['head'].iloc[0]:g}" if scores["head"].nunique() > 1 else "mean over channels"


def draw_scores(table: pd.DataFrame) -> Figure:
    """Score of every layer.head, trained filled, untrained hollow, uniform attention as a dash."""
    rows = score_table(table)
    names, quantities = families(rows), list(dict.fromkeys(rows["quantity"]))
    figure, axes = panels(len(quantities), len(names), size=(3.6, 2.2), sharey="row", sharex="col")
    for i, quantity in enumerate(quantities):
        for j, family in enumerate(names):
            ax, color = axes[i, j], family_colors()[family]
            mine = rows[(rows["family"] == family) & (rows["quantity"] == quantity)]
            for weights, part in mine.groupby("weights", sort=False):
                x = part["place"] + BESIDE[str(weights)]
                if weights == "trained":
                    bars = error_bars(part)
                    ax.errorbar(x, part["value"], yerr=bars, fmt="o", color=color, capsize=2, ms=5)
                    ax.plot(part["place"], part["baseline"], **UNIFORM)
                else:
                    ax.plot(x, part["value"], "o", color=color, mfc="none", ms=4, alpha=0.8)
            labels = mine.drop_duplicates("label").set_index("place")["label"].sort_index()
            step = -(-len(labels) // 8)
            ax.set_xticks(labels.index[::step], labels[::step])
            ax.set_xlim(-0.6, len(labels) - 0.4)
            values = rows.loc[rows["quantity"] == quantity, ["value", "high"]]
            top = float(np.nanmax(values.to_numpy(dtype=float)))
            ax.set_ylim(-0.03 * top, min(SHARES[1], 1.15 * top))
            ax.grid(axis="x", visible=False)
            if i == 0:
                ax.set_title(NAMES[family])
            if j == 0:
                ax.set_ylabel(QUANTITIES[quantity], fontsize=8)
            if i == len(quantities) - 1:
                ax.set_xlabel("layer.head" if "." in labels.iloc[0] else "layer (mean over channels)")
    looks = family_looks(names, marker="o", ls="")
    looks |= {"untrained weights": dict(color=NEUTRAL, marker="o", mfc="none", ls="")}
    legend(figure, looks | {"uniform attention": UNIFORM})
    return figure


def map_table(table: pd.DataFrame, weights: str = "trained") -> pd.DataFrame:
    """The rows of the maps of one sequence, in the order of families, layers, queries and keys."""
    return shown(table, ["layer", "query", "key"], part=["map"], weights=[weights], family=FAMILIES)


def draw_maps(table: pd.DataFrame) -> Figure:
    """One sequence: the pattern of each layer's best retrieving head; a triangle is below the target."""

    def decorate(ax: Any, family: str, layer: int, part: pd.DataFrame) -> None:
        size, column = part["query"].nunique(), target_cell(part)
        if column is not None:
            ax.plot(column, size - 0.5, marker=6, color="crimson", ms=8, clip_on=False, zorder=5)
            ax.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
        ax.set_title(f"{NAMES[family]}, layer {layer}\n{head_words(table, part)}", fontsize=8)

    figure = map_panels(map_table(table), ("key", "query"), "attention in a cell", decorate)
    legend(figure, {"the target's column": dict(color="crimson", marker=6, ls="", ms=8)})
    return figure
