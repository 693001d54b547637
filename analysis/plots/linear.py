"""Draws the tables of `probes.suite.linear`: what can be read off linearly, by lag and by layer."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.plots.common import BELOW, SHARES, SITE_WORDS, families, shown, shuffled_means
from probes.suite.linear import SITES
from ssm_retrieval.style import CONTROLS, FAMILIES, NAMES, NEUTRAL, faintness, family_colors, legend, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {  # part of the table: label of the axis
    "token": "test accuracy of the symbol's identity",
    "answer": "accuracy: part of the context with the target",
    "capacity": "expected number of symbols recovered",
}
LAG = "symbols since (1 = the last)"
MARKERS = {"residual": "o", "state": "s"}


def lag_table(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `draw_lags`: a series per family, site, weights and layer, sorted by lag.

    Column place is where a lag stands on the axis. It is lag + 1 where every lag was probed. A long
    context is probed densely at both of its ends; each lag then has as much room.
    """
    rows = shown(table, ["layer", "lag"], part=["token"], family=FAMILIES, site=SITES, weights=BELOW)
    lags = np.sort(rows["lag"].unique())
    places = lags + 1 if len(lags) == lags[-1] + 1 else np.arange(len(lags))
    return rows.assign(place=rows["lag"].map(dict(zip(lags, places, strict=True))))


def lag_ticks(rows: pd.DataFrame) -> tuple[list[float], list[str]]:
    """Ticks of the axis of lags, at most 10, and their labels: symbols since, 1 being the last."""
    lags = rows.drop_duplicates("lag").sort_values("lag")[["place", "lag"]].to_numpy()
    lags = lags[:: -(-len(lags) // 10)]
    return [float(place) for place, _ in lags], [f"{lag + 1:g}" for _, lag in lags]


def layer_table(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `draw_answer`: a series per part, family, site and weights, sorted by layer."""
    parts = ("answer", "capacity")
    return shown(table, ["layer"], part=parts, family=FAMILIES, site=MARKERS, weights=BELOW)


def draw_lags(table: pd.DataFrame) -> Figure:
    """Accuracy against lag, a panel per site and family: layers from faint to full, controls grey."""
    rows = lag_table(table)
    names, sites = families(rows), list(dict.fromkeys(site for site in SITES if site in set(rows["site"])))
    figure, axes = panels(len(sites), len(names), size=(3.4, 2.7), sharey=True)
    for (i, j), ax in np.ndenumerate(axes):
        family, site = names[j], sites[i]
        mine = rows[(rows["family"] == family) & (rows["site"] == site)]
        if mine.empty:
            ax.set_axis_off()
            continue
        color, layers = family_colors()[family], set(mine["layer"])
        for (weights, layer), part in mine.groupby(["weights", "layer"], sort=False):
            look: dict[str, Any] = dict(color=color, lw=1.5, marker=".")
            look = look if weights == "trained" else CONTROLS["untrained weights"]
            alpha = faintness(layer, layers)
            ax.plot(part["place"], part["value"], alpha=alpha, **look)
            ax.fill_between(part["place"], part["low"], part["high"], color=color, alpha=0.12 * alpha, lw=0)
        shuffled = shuffled_means(mine, "place")
        ax.plot(shuffled.index, shuffled, **CONTROLS["shuffled labels"])
        ax.axhline(mine["chance"].iloc[-1], **CONTROLS["chance"])
        ax.set(title=f"{NAMES[family]}, {SITE_WORDS[site]}", ylim=SHARES, xlabel=LAG)
        ax.title.set_color(color)
        ax.set_xticks(*lag_ticks(mine))
    for row in axes:
        first = next(ax for ax in row if ax.axison)
        first.set_ylabel(textwrap.fill(UNITS["token"], 24), fontsize=9)
        first.tick_params(labelleft=True)
    layers = set(rows["layer"])
    looks: dict[str, dict[str, Any]] = {
        f"layer {layer:g}": dict(color="0.2", marker=".", alpha=faintness(layer, layers))
        for layer in sorted(layers)
    }
    names_of_controls = ("untrained weights", "shuffled labels", "chance")
    legend(figure, looks | {name: CONTROLS[name] for name in names_of_controls})
    return figure


def draw_answer(table: pd.DataFrame) -> Figure:
    """By layer: is the target's place decodable (left), and how many tokens are (right)?"""
    rows = layer_table(table)
    figure, axes = panels(1, 2, size=(4.8, 3.8))
    looks: dict[str, dict[str, Any]] = {}
    hollow = dict(marker="o", mfc="none")
    for ax, part_name in zip(axes[0], ("answer", "capacity"), strict=True):
        mine = rows[rows["part"] == part_name]
        for (family, site, weights), part in mine.groupby(["family", "site", "weights"], sort=False):
            color, marker = family_colors()[str(family)], MARKERS[str(site)]
            look: dict[str, Any] = dict(color=color, marker=marker, ms=5, lw=1.5)
            if weights == "untrained":
                look = CONTROLS["untrained weights"] | dict(color=color, marker=marker, ms=5, mfc="none")
            else:
                looks[f"{NAMES[str(family)]}, {SITE_WORDS[str(site)]}"] = look
            ax.plot(part["layer"], part["value"], **look)
            ax.fill_between(part["layer"], part["low"], part["high"], color=color, alpha=0.12, lw=0)
        shuffled = shuffled_means(mine, "layer")
        ax.plot(shuffled.index, shuffled, **CONTROLS["shuffled labels"])
        ax.set(xlabel="layer")
        ax.set_ylabel(textwrap.fill(UNITS[part_name], 30), fontsize=9)
        ax.set_xticks(sorted(mine["layer"].unique().astype(int)))
    answer = rows[(rows["part"] == "answer") & (rows["weights"] == "trained")]
    axes[0, 0].axhline(answer["chance"].iloc[0], **CONTROLS["chance"])
    axes[0, 0].set_ylim(*SHARES)
    looks["untrained weights"] = CONTROLS["untrained weights"] | dict(color=NEUTRAL) | hollow
    legend(figure, looks | {name: CONTROLS[name] for name in ("shuffled labels", "chance")})
    return figure
