"""Draws the tables of `probes.suite.retention`: what is left by distance, and hidden attention maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.plots.common import families, map_panels, plain_log
from ssm_retrieval.style import NAMES, family_colors, legend, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {"kept": "share of its write that is left", "share": "norm of what is left / norm of the state"}
LEAST = 1e-8  # below which curves are not drawn


def draw_curves(table: pd.DataFrame) -> Figure:
    """Per layer against distance: target, distractors, and the target with untrained weights."""
    from matplotlib.ticker import MaxNLocator

    table, names = table[table["part"] == "curve"], families(table)
    count = max(table.loc[table["family"] == name, "layer"].nunique() for name in names)
    figure, axes = panels(len(names) * len(UNITS), count, size=(2.5, 2.2), sharex=True, sharey="row")
    for ax in axes.flat:
        ax.set_axis_off()
    for i, family in enumerate(names):
        for k, (quantity, label) in enumerate(UNITS.items()):
            mine = table[(table["family"] == family) & (table["quantity"] == quantity)]
            lines = (
                ("target", "trained", dict(color=family_colors()[family], lw=1.8)),
                ("distractor", "trained", dict(color="0.2", lw=1.2, ls="--")),
                ("target", "untrained", dict(color="0.6", lw=1.2, ls=":")),
            )
            for j, (layer, rows) in enumerate(mine.groupby("layer")):
                ax = axes[i * len(UNITS) + k, j]
                ax.set_axis_on()
                for name, weights, look in lines:
                    part = rows[(rows["role"] == name) & (rows["weights"] == weights)].sort_values("distance")
                    part = part[part["value"] > LEAST]
                    ax.plot(part["distance"], part["value"], **look)
                    ax.fill_between(
                        part["distance"],
                        part["low"].clip(LEAST),
                        part["high"],
                        color=look["color"],
                        alpha=0.2,
                        lw=0,
                    )
                ax.set_yscale("log")
                plain_log(ax.yaxis)
                if mine["distance"].max() > 64:
                    ax.set_xscale("log")
                    plain_log(ax.xaxis)
                else:
                    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
                if k == 0:
                    ax.set_title(f"{NAMES[family]}, layer {layer}", fontsize=9)
                if k == len(UNITS) - 1:
                    ax.set_xlabel("tokens before the answer", fontsize=9)
                    ax.tick_params(labelbottom=True)
                if j == 0:
                    ax.set_ylabel(label.replace(" / ", " /\n").replace(" that ", "\nthat "), fontsize=8)
            seen = mine.loc[mine["value"] > LEAST, "value"]
            axes[i * len(UNITS) + k, 0].set_ylim(seen.min() / 2, seen.max() * 2)  # not to a band's 0
    looks: dict[str, dict[str, Any]] = {
        f"target, {NAMES[name]}": dict(color=family_colors()[name], lw=1.8) for name in names
    }
    looks |= {
        "distractors": dict(color="0.2", ls="--"), "target, untrained weights": dict(color="0.6", ls=":"),
    }  # fmt: skip
    legend(figure, looks)
    return figure


def draw_maps(table: pd.DataFrame) -> Figure:
    """The hidden attention of every layer, trained; its reconstruction error is in the title."""
    trained = table[table["weights"] == "trained"]
    errors = trained[trained["part"] == "reconstruction"]

    def decorate(ax: Any, family: str, layer: int, part: pd.DataFrame) -> None:
        error = errors[(errors["family"] == family) & (errors["layer"] == layer)]["value"].iloc[0]
        ax.set_title(f"{NAMES[family]}, layer {layer}\nreconstruction error {error:.0e}", fontsize=8)

    unit = "share of the row's mean |alpha| in a cell"
    maps = trained[trained["part"] == "map"]
    return map_panels(maps, ("token written", "token reading"), unit, decorate)
