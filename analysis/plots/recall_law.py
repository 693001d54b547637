"""Draws recall against the load of a state, and the law that `analysis.capacity_law` fits to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.capacity_law import CELL, fit_constants, load, recall_at_load
from analysis.plots.common import SHARES
from ssm_retrieval.style import CONTROLS, FAMILIES, NAMES, faintness, family_colors, legend, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X"  # one for each width, from the smallest on
LOAD = "facts / (layers × N × D)"


def collapse_table(observations: pd.DataFrame) -> pd.DataFrame:
    """The points of `draw_collapse`, and the law that was fitted to each family.

    Args:
        observations: As for `analysis.capacity_law.fit_constant`, with a column model.

    Returns:
        One row per model and cell: load, accuracy (all seeds together), low and high (the worst and the best
        seed), seeds, law (what the fit expects), chance, and of the family's fit a, a_low, a_high and lapse.

    Raises:
        UserError: As `fit_constant`.
    """
    fits = fit_constants(observations).rename(columns={"low": "a_low", "high": "a_high"})
    rows = observations.assign(accuracy=observations["correct"] / observations["count"])
    cells = rows.groupby(["model", *CELL], as_index=False).agg(
        low=("accuracy", "min"),
        high=("accuracy", "max"),
        seeds=("seed", "nunique"),
        correct=("correct", "sum"),
        count=("count", "sum"),
    )
    table = cells.merge(fits[["model", "a", "a_low", "a_high", "lapse"]], on="model")
    table = table.assign(
        load=load(table["n_facts"], table["d_model"], table["d_state"], table["n_layer"]),
        accuracy=table["correct"] / table["count"],
        chance=1 / table["vocab_size"],
    )
    law = recall_at_load(table["load"], table["d_model"], table["vocab_size"], table["a"])
    return table.assign(law=(1 - table["lapse"]) * law)


def draw_collapse(table: pd.DataFrame) -> Figure:
    """Draw accuracy against the load: a column for each family, a row for each vocabulary.

    Points pool the seeds of a cell; their bars reach from the worst to the best seed. Lines are the fitted
    law, one for each width, because of its term 1 / D.

    Args:
        table: Result of `collapse_table`.

    Returns:
        The figure.
    """
    models = [name for name in FAMILIES if name in set(table["model"])]
    vocabularies, widths = (sorted(table[name].unique()) for name in ("vocab_size", "d_model"))
    looks = {
        D: dict(marker=MARKERS[i % len(MARKERS)], alpha=faintness(D, widths)) for i, D in enumerate(widths)
    }
    x = np.geomspace(table["load"].min() / 1.5, table["load"].max() * 1.5, 200)
    size = (3.2, 2.8)
    figure, axes = panels(len(vocabularies), len(models), size, sharex=True, sharey=True)
    for (i, j), ax in np.ndenumerate(axes):
        mine = table[(table["model"] == models[j]) & (table["vocab_size"] == vocabularies[i])]
        color = family_colors()[models[j]]
        for D, part in mine.groupby("d_model"):
            bars = [part["accuracy"] - part["low"], part["high"] - part["accuracy"]]
            ax.errorbar(part["load"], part["accuracy"], yerr=bars, color=color, ls="", ms=4, lw=1, **looks[D])
            fit = part.iloc[0]
            law = (1 - fit["lapse"]) * recall_at_load(x, D, vocabularies[i], fit["a"])
            ax.plot(x, law, color=color, lw=1.5, alpha=looks[D]["alpha"])
        ax.axhline(1 / vocabularies[i], **CONTROLS["chance"])
        ax.set(xscale="log", ylim=SHARES)
        if i == 0 and len(mine):
            fit = mine.iloc[0]
            words = f"a = {fit['a']:.3g} [{fit['a_low']:.3g}, {fit['a_high']:.3g}]"
            ax.set_title(f"{NAMES[models[j]]}\n{words}", fontsize=9)
        if i == len(vocabularies) - 1:
            ax.set_xlabel(LOAD)
        if j == 0:
            ax.set_ylabel(f"{vocabularies[i]} tokens\naccuracy")
    entries = {f"D = {D}": dict(color="0.3", ls="", **look) for D, look in looks.items()}
    legend(figure, entries | {"law": dict(color="0.3"), "chance": CONTROLS["chance"]}, width=1.2)
    return figure
