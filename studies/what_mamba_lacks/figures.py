"""The figures of this study: steps to 0.95 of every cell, effects, and what models build in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ssm_retrieval.style import NAMES, NEUTRAL, family_colors, legend, panels, save, theme
from studies.what_mamba_lacks.config import LENGTH, LEVELS, Cell
from studies.what_mamba_lacks.effects import FACTORIALS, OUTCOMES, SSMS, bounds, each, effects, factorial

WORDS = {  # of a cell, by level; published defaults go without saying
    "learned": "positions", "identity": "identity", "none": "no conv.", "long": "long", "tied": "tied",
}  # fmt: skip
MEASURES = {"identity": "last tap's share", "long": f"states that keep half\nfor {LENGTH} tokens",
            "gap": "cosine of C with own B,\nminus others"}  # fmt: skip
ROW = 0.21  # inches


def write(runs: pd.DataFrame, grown: pd.DataFrame) -> None:
    """Every figure that has data, as PNG and PDF beside this file.

    Args:
        runs: Rows of `effects.outcomes`.
        grown: Rows of `report.growth`.
    """
    import matplotlib

    matplotlib.use("Agg")
    short = runs[runs["seq_len"] == LENGTH]
    whole = {model: chosen for model in FACTORIALS if len(chosen := factorial(short, model))}
    with theme():
        if runs["model"].isin(SSMS).any():
            save(steps(runs), Path(__file__).with_name("steps"))
        if whole:
            found = {model: effects(chosen, model) for model, chosen in whole.items()}
            save(main_effects(found), Path(__file__).with_name("effects"))
        if len(grown):
            save(growth(grown), Path(__file__).with_name("built"))


def words(cell: Cell) -> str:
    """What a cell has besides the published default."""
    found = [WORDS[level] for factor in LEVELS if (level := getattr(cell, factor)) in WORDS]
    found = found[1:] if cell.positions == "none" else found
    return " + ".join(found) or "nothing"


def steps(runs: pd.DataFrame) -> Any:
    """A panel per model and length, a row per cell: between which evaluations the median run passes 0.95."""
    import matplotlib.pyplot as plt

    parts = each(runs)
    heights = [len(found) + 2.5 for *_, found in parts]
    figure, axes = plt.subplots(
        len(parts), 1, figsize=(7.2, ROW * sum(heights) + 0.8), squeeze=False, layout="constrained",
        gridspec_kw=dict(height_ratios=heights),
    )  # fmt: skip
    for ax, (model, length, found) in zip(axes[:, 0], parts, strict=True):
        _rows(ax, found, family_colors()[model])
        ax.set_title(f"{NAMES[model]}, {length} symbols", fontsize=10)
    axes[-1, 0].set_xlabel("steps until held-out accuracy passes 0.95")
    colour = family_colors()[parts[0][0]]
    looks: dict[str, dict[str, Any]] = {
        "median, between two evaluations": dict(color=colour, marker="o", lw=2),
        "most seeds are not there: limit": dict(color=NEUTRAL, marker=">", lw=0),
        "a seed": dict(color=colour, marker="|", lw=0, alpha=0.6),
    }
    legend(figure, looks, width=2.4)
    return figure


def _rows(ax: Any, found: dict[Cell, pd.DataFrame], colour: Any) -> None:
    """One row per cell: its seeds, the median's bounds, or an arrow at the limit; k of n beside it."""
    limit = max(float(cell["steps"].max()) for cell in found.values())
    for y, cell in enumerate(found.values()):
        low, high = bounds(cell)
        there = cell[cell["reached"]]
        ax.plot(there["value"], np.full(len(there), y), "|", color=colour, alpha=0.6, ms=8)
        if np.isfinite(high):
            ax.plot([low, high], [y, y], color=colour, lw=2)
            ax.plot((low + high) / 2, y, "o", color=colour, ms=5)
        else:
            ax.plot(low, y, ">", color=NEUTRAL, ms=6)
        text = f"{len(there)} of {len(cell)}"
        ax.text(1.01, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    ax.set_yticks(range(len(found)), [words(cell) for cell in found], fontsize=8)
    ax.set(xlim=(0, 1.05 * limit), ylim=(len(found) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)


def main_effects(found: dict[str, pd.DataFrame]) -> Any:
    """A panel per outcome: what each ingredient changes on average over the others, by model.

    Args:
        found: Rows of `effects` by model.

    Returns:
        The figure.
    """
    plain = {model: table[~table["term"].str.contains(" x ")] for model, table in found.items()}
    names = pd.concat(plain.values())[["term", "contrast"]].drop_duplicates()
    rows = [f"{term}: {contrast}" for term, contrast in names.itertuples(index=False)]
    figure, axes = panels(1, len(OUTCOMES), size=(2.9, 0.5 * len(rows)), sharey=True)
    for ax, outcome in zip(axes[0], OUTCOMES, strict=True):
        for shift, (model, table) in enumerate(plain.items()):
            colour = family_colors()[model]
            for value in table[table["outcome"] == outcome].to_dict("records"):
                place = rows.index(f"{value['term']}: {value['contrast']}")
                y = place + 0.22 * (shift - (len(plain) - 1) / 2)
                ax.plot([value["low"], value["high"]], [y, y], color=colour, lw=1.6)
                ax.plot(value["effect"], y, "o", color=colour, ms=5)
        ax.axvline(0, color="0.4", lw=1, ls=":")
        ax.set_xlabel(f"change of\n{outcome}", fontsize=9)
        ax.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(rows)), rows, fontsize=8)
    axes[0, 0].invert_yaxis()
    legend(figure, {NAMES[model]: dict(color=family_colors()[model], marker="o") for model in found})
    return figure


def growth(grown: pd.DataFrame) -> Any:
    """A column per model, a row per ingredient and one for the length in training; a line per seed."""
    models = list(grown["model"].unique())
    measures = {"train_length": "length in training", **MEASURES}
    figure, axes = panels(len(measures), len(models), size=(3.6, 1.5), sharex="col", sharey="row")
    for j, model in enumerate(models):
        part = grown[grown["model"] == model]
        for i, (column, label) in enumerate(measures.items()):
            for _, run in part.groupby("seed"):
                style = "steps-post" if column == "train_length" else "default"
                axes[i, j].plot(
                    run["step"], run[column], color=family_colors()[model], alpha=0.6, drawstyle=style
                )
            if j == 0:
                axes[i, j].set_ylabel(label, fontsize=8)
        axes[0, j].set_title(NAMES[model], fontsize=10)
        axes[0, j].set_yscale("log", base=2)
        axes[0, j].yaxis.set_major_formatter("{x:.0f}")
        axes[-1, j].set_xlabel("step")
    return figure
