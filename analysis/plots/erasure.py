"""Draws the table of `probes.suite.erasure`: writes and erasures by position, survival, hidden attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.plots import retention
from analysis.plots.common import families, layer_panels, map_panels, shown
from ssm_retrieval.style import FAMILIES, NAMES, family_colors, legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = {"write": "what is written", "erase": "what is erased"}
DASHES = {"write": "-", "erase": "--"}
LEFT = {"kept": "share of its write that is left"}


def position_table(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `draw`: a series per family, layer and line of `LINES`, sorted by position."""
    rows = table[(table["part"] == "position") & (table["weights"] == "trained")]
    order: Any = dict(family=FAMILIES, layer=sorted(rows["layer"].unique()), quantity=LINES)
    return shown(rows, ["position"], **order)


def draw(table: pd.DataFrame) -> Figure:
    """Norms of what every token writes and erases, per layer against its position."""
    rows = position_table(table)
    figure, axes = layer_panels(rows, 1, size=(2.6, 2.2))
    for i, family in enumerate(families(rows)):
        for j, (layer, part) in enumerate(rows[rows["family"] == family].groupby("layer")):
            ax = axes[i, j]
            ax.set_axis_on()
            for name, line in part.groupby("quantity", sort=False):
                color = family_colors()[family]
                ax.plot(line["position"], line["value"], color=color, lw=1.8, ls=DASHES[str(name)])
                ax.fill_between(line["position"], line["low"], line["high"], color=color, alpha=0.2, lw=0)
            ax.set_title(f"{NAMES[family]}, layer {layer}", fontsize=9)
            ax.set_xlabel("position of the token", fontsize=9)
            ax.tick_params(labelbottom=True)
            if j == 0:
                ax.set_ylabel("norm (mean over sequences)", fontsize=8)
    legend(figure, {LINES[name]: dict(color="0.3", lw=1.8, ls=ls) for name, ls in DASHES.items()})
    return figure


def draw_curves(table: pd.DataFrame) -> Figure:
    """What is left of a write when the answer is due, per layer against distance."""
    return retention.draw_curves(table, LEFT)


def draw_maps(table: pd.DataFrame) -> Figure:
    """The hidden attention of every layer, trained; in the title the error of a map without erasures."""
    errors = table[(table["part"] == "reconstruction") & (table["weights"] == "trained")]
    errors = errors[errors["quantity"] == "relative error without erasures"]

    def decorate(ax: Any, family: str, layer: int, part: pd.DataFrame) -> None:
        error = errors[(errors["family"] == family) & (errors["layer"] == layer)]["value"]
        said = f"without erasures off by {error.iloc[0]:.0%}" if len(error) else "erases nothing"
        ax.set_title(f"{NAMES[family]}, layer {layer}\n{said}", fontsize=8)

    maps = table[(table["part"] == "map") & (table["weights"] == "trained")]
    unit = "share of the row's mean |M| in a cell"
    return map_panels(maps, ("token written", "token reading"), unit, decorate)
