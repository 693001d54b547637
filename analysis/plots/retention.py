"""Draws the tables of `probes.suite.retention`: what is left by distance, and hidden attention maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.plots.common import families, family_looks, layer_panels, map_panels, plain_log, shown
from ssm_retrieval.style import CONTROLS, FAMILIES, NAMES, family_colors, legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {"kept": "share of its write that is left", "share": "norm of what is left / norm of the state"}
DISTANCE = "tokens before the answer"
LEAST = 1e-8  # below which curves are not drawn
LONG = 64  # tokens; beyond, the axis is logarithmic
LINES = {  # (role, weights): name in the legend; in the order in which they are drawn
    ("target", "untrained"): "untrained weights",
    ("distractor", "trained"): "distractors",
    ("target", "trained"): "target",
}


def curve_table(table: pd.DataFrame, units: Mapping[str, str] = UNITS) -> pd.DataFrame:
    """The rows of `draw_curves`: a series per family, quantity, layer and line, sorted by distance.

    Column line is one of `LINES`. Values below `LEAST` are left out, intervals end there.
    """
    rows = table[(table["part"] == "curve") & (table["value"] > LEAST)]
    lines = [LINES.get(pair, "") for pair in zip(rows["role"], rows["weights"], strict=True)]
    rows = rows.assign(line=lines, low=rows["low"].clip(LEAST))
    layers = sorted(rows["layer"].unique())
    order: Any = dict(family=FAMILIES, quantity=units, layer=layers, line=LINES.values())
    return shown(rows, ["distance"], **order)


def line_look(line: str, family: str) -> dict[str, Any]:
    """Colour, dashes and width of one of `LINES`: the target has its family's colour."""
    return dict(color=family_colors()[family], lw=1.8) if line == "target" else CONTROLS[line]


def limits(rows: pd.DataFrame) -> tuple[float, float]:
    """Limits of the logarithmic axis of values: room around the lines, but not down to a band's 0."""
    return float(rows["value"].min()) / 2, float(rows["value"].max()) * 2


def draw_curves(table: pd.DataFrame, units: Mapping[str, str] = UNITS) -> Figure:
    """Per layer against distance: target, distractors, and the target with untrained weights.

    Args:
        table: Rows with part "curve".
        units: Quantities to draw, with their labels.

    Returns:
        The figure.
    """
    from matplotlib.ticker import MaxNLocator

    table = curve_table(table, units)
    names = families(table)
    figure, axes = layer_panels(table, len(units), size=(2.5, 2.2))
    for i, family in enumerate(names):
        for k, (quantity, label) in enumerate(units.items()):
            mine = table[(table["family"] == family) & (table["quantity"] == quantity)]
            for j, (layer, rows) in enumerate(mine.groupby("layer")):
                ax = axes[i * len(units) + k, j]
                ax.set_axis_on()
                for line, part in rows.groupby("line", sort=False):
                    look = line_look(str(line), family)
                    ax.plot(part["distance"], part["value"], **look)
                    band = part["distance"], part["low"], part["high"]
                    ax.fill_between(*band, color=look["color"], alpha=0.2, lw=0)
                ax.set_yscale("log")
                plain_log(ax.yaxis)
                if mine["distance"].max() > LONG:
                    ax.set_xscale("log")
                    plain_log(ax.xaxis)
                else:
                    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
                if k == 0:
                    ax.set_title(f"{NAMES[family]}, layer {layer}", fontsize=9)
                if k == len(units) - 1:
                    ax.set_xlabel(DISTANCE, fontsize=9)
                    ax.tick_params(labelbottom=True)
                if j == 0:
                    ax.set_ylabel(label.replace(" / ", " /\n").replace(" that ", "\nthat "), fontsize=8)
            axes[i * len(units) + k, 0].set_ylim(*limits(mine))
    looks = family_looks(names, "target, {}", lw=1.8)
    looks |= {"distractors": CONTROLS["distractors"]}
    legend(figure, looks | {"target, untrained weights": CONTROLS["untrained weights"]})
    return figure


def reconstruction_errors(table: pd.DataFrame, family: str) -> pd.Series:
    """How far, relatively, hidden attention misses a family's own outputs, by layer, trained weights."""
    rows = table[(table["part"] == "reconstruction") & (table["weights"] == "trained")]
    errors: pd.Series = rows[rows["family"] == family].set_index("layer")["value"]
    return errors


def draw_maps(table: pd.DataFrame) -> Figure:
    """The hidden attention of every layer, trained; its reconstruction error is in the title."""

    def decorate(ax: Any, family: str, layer: int, part: pd.DataFrame) -> None:
        error = reconstruction_errors(table, family).loc[layer]
        ax.set_title(f"{NAMES[family]}, layer {layer}\nreconstruction error {error:.0e}", fontsize=8)

    unit = "share of the row's mean |alpha| in a cell"
    maps = table[(table["part"] == "map") & (table["weights"] == "trained")]
    return map_panels(maps, ("token written", "token reading"), unit, decorate)
