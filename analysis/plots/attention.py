"""Draws the tables of `probes.suite.attention`: scores by head, and the map of each layer's best head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.plots.common import error_bars, families, map_panels
from probes.suite.common import WEIGHTS
from ssm_retrieval.style import NAMES, family_colors, legend, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTITIES = {
    "retrieval": "attention from the answer's\nposition to the target",
    "induction": "attention to the token after\nthe previous occurrence",
    "previous": "attention to the\nprevious token",
}


def draw_scores(table: pd.DataFrame) -> Figure:
    """Score of every layer.head, trained filled, untrained hollow, uniform attention as a dash."""
    table, names = table[table["part"] == "score"], families(table)
    rows = [q for q in QUANTITIES if q in set(table["quantity"])]
    figure, axes = panels(len(rows), len(names), size=(3.6, 2.2), sharey="row", sharex="col")
    for i, quantity in enumerate(rows):
        for j, family in enumerate(names):
            ax, color = axes[i, j], family_colors()[family]
            mine = table[(table["family"] == family) & (table["quantity"] == quantity)]
            mine = mine.sort_values(["layer", "head"])
            mine = mine.assign(label=head_labels(mine))
            labels = list(dict.fromkeys(mine["label"]))
            for weights in WEIGHTS:
                part = mine[mine["weights"] == weights]
                x = np.array([labels.index(label) for label in part["label"]])
                if weights == "trained":
                    ax.errorbar(
                        x - 0.1, part["value"], yerr=error_bars(part), fmt="o", color=color, capsize=2, ms=5
                    )
                    ax.plot(x, part["baseline"], ls="", marker="_", ms=14, mew=1.5, color="0.3")
                else:
                    ax.plot(x + 0.15, part["value"], "o", color=color, mfc="none", ms=4, alpha=0.8)
            step = -(-len(labels) // 8)
            ax.set_xticks(range(0, len(labels), step), labels[::step])
            ax.set_xlim(-0.6, len(labels) - 0.4)
            shown = table.loc[table["quantity"] == quantity, ["value", "high"]]
            top = float(np.nanmax(shown.to_numpy(dtype=float)))
            ax.set_ylim(-0.03 * top, min(1.03, 1.15 * top))
            ax.grid(axis="x", visible=False)
            if i == 0:
                ax.set_title(NAMES[family])
            if j == 0:
                ax.set_ylabel(QUANTITIES[quantity], fontsize=8)
            if i == len(rows) - 1:
                ax.set_xlabel("layer.head" if "." in labels[0] else "layer (mean over channels)")
    looks: dict[str, dict[str, Any]] = {
        NAMES[name]: dict(color=family_colors()[name], marker="o", ls="") for name in names
    }
    looks |= {
        "untrained weights": dict(color="0.3", marker="o", mfc="none", ls=""),
        "uniform attention": dict(color="0.3", marker="_", ms=14, mew=1.5, ls=""),
    }
    legend(figure, looks)
    return figure


def draw_maps(table: pd.DataFrame) -> Figure:
    """One sequence: the pattern of each layer's best retrieving head; a triangle is below the target."""
    maps = table[(table["part"] == "map") & (table["weights"] == "trained")]

    def decorate(ax: Any, family: str, layer: int, part: pd.DataFrame) -> None:
        target = part["target"].iloc[0]
        if np.isfinite(target):
            starts = np.sort(part["key"].unique())
            column = int(np.searchsorted(starts, target, side="right")) - 1
            ax.plot(column, len(starts) - 0.5, marker=6, color="crimson", ms=8, clip_on=False, zorder=5)
            ax.set(xlim=(-0.5, len(starts) - 0.5), ylim=(len(starts) - 0.5, -0.5))
        single = table[(table["family"] == family) & (table["part"] == "score")]["head"].nunique() == 1
        which = "mean over channels" if single else f"head {part['head'].iloc[0]}"
        ax.set_title(f"{NAMES[family]}, layer {layer}\n{which}", fontsize=8)

    figure = map_panels(maps, ("key", "query"), "attention in a cell", decorate)
    legend(figure, {"the target's column": dict(color="crimson", marker=6, ls="", ms=8)})
    return figure


def head_labels(part: pd.DataFrame) -> list[str]:
    """layer.head, or the layer where every layer has one."""
    single = part["head"].nunique() == 1
    return [f"{r.layer}" if single else f"{r.layer}.{r.head}" for r in part.itertuples()]
