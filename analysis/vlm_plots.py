"""Figures and tables of vision & language results, published ones or your own.

Your own results are the table of `vlm.evaluate` (`vlm.results.COLUMNS`): one row per run, task and metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import published
from ssm_retrieval.statistics import mean_interval, one_mode
from ssm_retrieval.style import DOUBLE, NAMES, SINGLE, family_colors
from vlm.layout import readings
from vlm.results import GUESSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIGHTEST = 0.45  # opacity of a family's first bar; the last one is opaque
GUESSED = "best guess that looks nothing up"  # in legends
ALIKE = ["family", "model", "init", "patch"]  # columns in which runs that are compared do not differ
MAIN = ("accuracy", "iou@0.5", "vqa_accuracy", "anls")  # the metric of a task that figures show


def gap_vs_scale(table: pd.DataFrame, width: float = DOUBLE) -> Figure:
    """Plot Pythia-VL minus Mamba-VL against size, by benchmark and in means.

    Left: grounding benchmarks, the suspect cell in a circle. Right: means with and without its benchmark.

    Args:
        table: `published.results()`.
        width: Width in inches; at one column the right panel stands below the left one.

    Returns:
        The figure.
    """
    import matplotlib.pyplot as plt
    import seaborn

    every, means = published.gaps(table), published.mean_gaps(table)
    pairs = list(dict.fromkeys(every["pair"]))
    places = {pair: i for i, pair in enumerate(pairs)}
    shape = (1, 2) if width > SINGLE else (2, 1)
    figure, (left, right) = plt.subplots(
        *shape, figsize=(width, 2.9 * shape[0]), sharey=True, layout="constrained"
    )
    grounding = every[every["group"] == "grounding"]
    colours = [seaborn.color_palette("colorblind")[i] for i in (2, 3, 4, 5, 6, 9)]  # none of a family's
    marks = "osD^vP"
    for i, (label, part) in enumerate(grounding.groupby("label", sort=False)):
        x = part["pair"].map(places)
        left.plot(x, part["gap"], color=colours[i], marker=marks[i], markersize=4, lw=1, label=label)
        odd = part[part["suspect"]]
        left.plot(odd["pair"].map(places), odd["gap"], "o", markersize=11, mfc="none", color="black", lw=0)
        for _, row in odd.iterrows():
            at, away = (places[row["pair"]], row["gap"]), (8, -3)
            left.annotate("suspect cell", at, away, textcoords="offset points", fontsize=7)
    looks = (("-", "o", "black"), ("--", "s", "black"), (":", "D", "0.5"))
    for (name, rows), (line, mark, colour) in zip(means.groupby("part", sort=False), looks, strict=True):
        label = f"{name} ({rows['benchmarks'].iloc[0]})"
        x = rows["pair"].map(places)
        right.plot(x, rows["gap"], ls=line, marker=mark, markersize=4, color=colour, label=label)
    for ax, title in ((left, "Grounding, by benchmark"), (right, "Means over benchmarks (their number)")):
        ax.axhline(0, color="black", lw=0.8)
        ax.set_xticks(range(len(pairs)), pairs)
        ax.set_xlabel("weights of the language models", fontsize=8)
        ax.set_title(title, fontsize=8)
        ax.tick_params(labelsize=7.5)
        ax.legend(fontsize=6.5, frameon=False, loc="lower right")
        ax.set_xlim(-0.3, len(pairs) - 0.7)
    left.set_ylim(-16, 12)
    left.set_ylabel("Pythia-VL minus Mamba-VL (points)", fontsize=8)
    return figure


def main_rows(results: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each task's main metric."""
    return results[results["metric"].isin(MAIN)]


def best_guess(rows: pd.DataFrame) -> float:
    """Return the highest of GUESSES in the rows of a task; nan if they have none."""
    return float(rows[list(GUESSES)].astype(float).max().max())


def over_seeds(
    results: pd.DataFrame, by: list[str], bounds: tuple[float, float] | None = None
) -> pd.DataFrame:
    """Average `value` over seeds.

    Args:
        results: Rows with `value` and `seed`.
        by: Columns to group by.
        bounds: Bounds of the interval, such as (0, 1) for shares.

    Returns:
        Columns `by`, mean, low and high, seeds, interval. low and high are the 95 % t interval where
        `ssm_retrieval.statistics.one_mode` allows it (interval "Student"), else lowest and highest seed
        ("range"), nan for a single one.
    """
    rows = []
    for cell, part in results.groupby(by, sort=False):
        values = part.groupby("seed")["value"].mean().to_numpy()
        mean, low, high = mean_interval(values, bounds=bounds)
        student = one_mode(values)
        if not student and len(values) > 1:
            low, high = float(values.min()), float(values.max())
        found = dict(mean=mean, low=low, high=high, seeds=len(values))
        words = dict(interval="Student" if student else "range")
        rows.append(dict(zip(by, cell, strict=True)) | found | words)
    return pd.DataFrame(rows)


def patch_pixels(image_size: int, image_tokens: int, layout: str) -> int:
    """Find the patches of an image by its tokens.

    Args:
        image_size: Pixels of the image's side.
        image_tokens: Tokens of the image (`vlm.layout.image_ids`), all that stand in the prompt.
        layout: Where the image stands.

    Returns:
        Pixels of a patch's side.
    """
    one = image_tokens // readings(layout)  # side (side + 1) + 1
    return image_size // ((math.isqrt(4 * one - 3) - 1) // 2)


def by_patch(results: pd.DataFrame) -> pd.DataFrame:
    """Tell encoders of other patches apart, and models that began with other weights.

    Args:
        results: Columns `vlm.results.COLUMNS`.

    Returns:
        The main rows, with `patch`, the pixels of a patch's side, and "" in `init` where it is missing.
    """
    rows = main_rows(results)
    columns = (rows[name] for name in ("image_size", "image_tokens", "layout"))
    patch = [patch_pixels(*values) for values in zip(*columns, strict=True)]
    return rows.assign(patch=patch, init=rows["init"].fillna("") if "init" in rows else "")


def resolution_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return right answers by task, model and resolution (Fig. 3), agnostic; empty for one resolution."""
    rows = by_patch(results)
    rows = rows[rows["layout"] == "agnostic"]
    sizes: Any = rows.groupby(ALIKE)["image_size"]
    rows = rows[sizes.transform("nunique") > 1]
    if rows.empty:
        return rows
    table = over_seeds(rows, ["task", *ALIKE, "image_size"], (0, 1))
    facts = rows.astype(dict.fromkeys(GUESSES, float)).groupby("task", as_index=False)[list(GUESSES)].mean()
    return table.merge(facts, on="task", how="left")


def layout_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return the relative difference of other layouts to the agnostic one (Fig. 4), seed by seed.

    The difference is (value - agnostic) / agnostic of runs that are ALIKE, of equal resolution and seed. The
    table is empty if there is no other layout to compare.
    """
    rows = by_patch(results)
    keys = ["task", *ALIKE, "image_size", "seed"]
    base = rows[rows["layout"] == "agnostic"].set_index(keys)["value"]
    others = rows[rows["layout"] != "agnostic"].join(base.rename("agnostic"), on=keys)
    others = others[others["agnostic"] > 0]
    if others.empty:
        return others
    others = others.assign(value=(others["value"] - others["agnostic"]) / others["agnostic"])
    return over_seeds(others, ["task", *ALIKE, "image_size", "layout"])


def resolution(table: pd.DataFrame, width: float = DOUBLE) -> Figure:
    """Plot `resolution_table` as bars, one panel per family.

    The best of GUESSES is a dotted line. `width` is in inches.
    """
    return _bars(table, lambda row: f"{row['image_size']} px", "right answers (share)", width, chance=True)


def layouts(table: pd.DataFrame, width: float = DOUBLE) -> Figure:
    """Plot `layout_table` as bars, one panel per family; `width` in inches."""

    def name(row: pd.Series) -> str:
        return f"{row['layout']}, {row['image_size']} px"

    return _bars(table, name, "relative difference to agnostic", width, chance=False)


def _said(key: str, row: pd.Series) -> str:
    if key == "init":
        return f"from {row[key] or 'nothing'}"
    return f"patches of {row[key]} px" if key == "patch" else str(row[key])


def _bars(
    table: pd.DataFrame, name: Callable[[pd.Series], str], label: str, width: float, chance: bool
) -> Figure:
    """A bar a row, named by name(row) and by what else is not the same in all of a family's rows."""
    import matplotlib.pyplot as plt

    families = [name for name in NAMES if name in set(table["family"])]
    tasks = list(dict.fromkeys(table["task"]))
    narrow = width <= SINGLE
    shape = (width, (2.5 if narrow else 2.1) * len(families))
    figure, axes = plt.subplots(
        len(families), 1, figsize=shape, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    if chance:
        axes[0, 0].set_ylim(0, 1.2)  # room for the legend
    colours = family_colors()
    for ax, family in zip(axes[:, 0], families, strict=True):
        mine = table[table["family"] == family]
        also = [key for key in ALIKE if mine[key].nunique() > 1]
        named = [", ".join([*(_said(key, row) for key in also), name(row)]) for _, row in mine.iterrows()]
        names = list(dict.fromkeys(named))
        bar = 0.8 / len(names)
        for said, (_, row) in zip(named, mine.iterrows(), strict=True):
            place = names.index(said)
            x = tasks.index(row["task"]) + (place - (len(names) - 1) / 2) * bar
            alpha = LIGHTEST + (1 - LIGHTEST) * place / max(1, len(names) - 1)
            drawn = ax.bar(x, row["mean"], bar, color=colours[family], alpha=alpha)
            if said not in ax.get_legend_handles_labels()[1]:
                drawn.set_label(said)
            if np.isfinite(row["low"]):
                ax.plot([x, x], [row["low"], row["high"]], color="black", lw=0.8)
        for i, task in enumerate(tasks if chance else ()):
            guess = best_guess(mine[mine["task"] == task])
            ax.plot([i - 0.45, i + 0.45], [guess, guess], color="black", ls=":", lw=1)
        note = f" (dotted: {GUESSED})" if chance else ""
        ax.set_title(NAMES[family] + (note.replace(" (", "\n(") if narrow else note), fontsize=7.5)
        ax.axhline(0, color="black", lw=0.8)
        ax.set_ylabel(label, fontsize=7)
        ax.tick_params(axis="y", labelsize=7)
        ax.legend(fontsize=6.5, frameon=False, ncols=1 if narrow else len(names))
    tilt = 60 if narrow else 25
    axes[-1, 0].set_xticks(range(len(tasks)), tasks, rotation=tilt, ha="right", fontsize=7)
    return figure


def markdown(table: pd.DataFrame) -> str:
    """Return published results in Markdown: the better of each pair bold, the suspect cell marked."""
    cells = _cells(table, lambda text: f"**{text}**", "†")
    lines = ["| " + " | ".join(["model", *cells.columns]) + " |", "|" + "---|" * (len(cells.columns) + 1)]
    lines += [
        "| " + " | ".join([str(name), *row]) + " |"
        for name, row in zip(cells.index, cells.values, strict=True)
    ]
    note = "† suspect: below its own testB, where every other model is above; see analysis/published."
    return "\n".join([*lines, "", f"Source: {published.SOURCE}. Bold: the better of a pair.", "", note, ""])


def latex(table: pd.DataFrame) -> str:
    """Return `markdown` as a booktabs table, models in columns so that it fits a page."""
    cells = _cells(table, lambda text: rf"\textbf{{{text}}}", r"$^\dagger$").T
    head = " & ".join(["", *(str(name) for name in cells.columns)])
    lines = [r"\begin{tabular}{l" + "r" * len(cells.columns) + "}", r"\toprule", head + r" \\", r"\midrule"]
    lines += [
        " & ".join([str(name), *row]) + r" \\" for name, row in zip(cells.index, cells.values, strict=True)
    ]
    width = len(cells.columns) + 1
    note = rf"\multicolumn{{{width}}}{{l}}{{\footnotesize $^\dagger$ suspect: below its own testB.}}"
    return "\n".join([f"% {published.SOURCE}", *lines, r"\bottomrule", note, r"\end{tabular}", ""])


def _cells(table: pd.DataFrame, bold: Callable[[str], str], mark: str) -> pd.DataFrame:
    """Printed values, models down and benchmarks across."""
    best = table.groupby(["pair", "benchmark"])["value"].transform("max")
    printed = [
        (bold(f"{value:.2f}") if value == top else f"{value:.2f}") + (mark if suspect else "")
        for value, top, suspect in zip(table["value"], best, table["suspect"], strict=True)
    ]
    wide = table.assign(printed=printed).pivot(index="model", columns="label", values="printed")
    labels = [published.LABELS.get(b, b) for names in published.GROUPS.values() for b in names]
    return wide.loc[list(published.SIZES), labels]
