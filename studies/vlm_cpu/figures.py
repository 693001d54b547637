"""The figures of this study, drawn from its tables (summary.py calls them)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.vlm_plots import GUESSED, best_guess, main_rows
from ssm_retrieval.style import DOUBLE, NAMES, family_colors, legend
from studies.vlm_cpu import summary
from studies.vlm_cpu.runs import LAYOUTS

MARKS = {"agnostic": "s", "instruction-first": "D", "query-first": "o"}


def accuracy(results: pd.DataFrame) -> Any:
    """Right answers by task, and CIDEr of captions: seeds (dashes) and their means."""
    import matplotlib.pyplot as plt

    rows, colors = main_rows(results), family_colors()
    names = list(dict.fromkeys(rows["task"]))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(DOUBLE * 1.3, 3.6), width_ratios=(len(names), 1.3), layout="constrained"
    )
    looks = [(family, cell) for family in summary.FAMILIES for cell in summary.cells(rows)]

    def marks(ax: Any, part: pd.DataFrame, place: int) -> None:
        for k, (family, cell) in enumerate(looks):
            values = summary.part_of(part, family, cell)["value"]
            x = place + (k - (len(looks) - 1) / 2) * 0.1
            ax.plot([x, x], [values.min(), values.max()], color=colors[family], lw=0.8, alpha=0.4)
            ax.plot([x] * len(values), values, "_", color=colors[family], ms=5, mew=1.5)
            ax.plot(x, values.mean(), ms=4.5, **_look(cell, colors[family]))

    for i, task in enumerate(names):
        part = rows[rows["task"] == task]
        left.plot([i - 0.45, i + 0.45], [best_guess(part)] * 2, color="0.2", ls=":", lw=1.2)
        marks(left, part, i)
    marks(right, results[results["metric"] == "cider"], 0)
    left.set_xticks(range(len(names)), [name.replace("grounding-c", "grounding:\nnew c") for name in names])
    left.set(ylim=(0, 1), ylabel="right answers")
    right.set_xticks([0], ["caption"])
    right.set(xlim=(-0.6, 0.6), ylabel="CIDEr")
    right.set_ylim(bottom=0)
    for ax in (left, right):
        ax.tick_params(labelsize=8)
        ax.yaxis.label.set_size(8)
        ax.grid(axis="x", visible=False)
    shown = {
        f"{NAMES[family]}, {summary.named(cell)}": dict(ms=5, **_look(cell, colors[family]))
        for family, cell in looks
    }
    legend(figure, shown | {GUESSED: dict(color="0.2", ls=":")}, width=2.6)
    return figure


def _look(cell: tuple[str, int], color: Any) -> dict[str, Any]:
    """Filled where the question comes first; a triangle for the higher resolution."""
    layout, size = cell
    mark = "^" if size > 64 else MARKS[layout]
    return dict(marker=mark, color=color, ls="", mfc=color if layout == "query-first" else "white")


def looking(looks: pd.DataFrame) -> Any:
    """Target's patches over other shapes' by layer; a panel per family and quantity, points are seeds."""
    import matplotlib.pyplot as plt

    rows = summary.at_answer(looks)
    rows = rows[rows["image_size"] == rows["image_size"].min()]
    cells = list(dict.fromkeys(zip(rows["family"], rows["quantity"], strict=True)))
    figure, axes = plt.subplots(1, len(cells), figsize=(DOUBLE * 1.5, 2.9), squeeze=False)
    for ax, (family, quantity) in zip(axes[0], cells, strict=True):
        color = family_colors()[family]
        for k, layout in enumerate(LAYOUTS):
            mine = rows[
                (rows["family"] == family) & (rows["quantity"] == quantity) & (rows["layout"] == layout)
            ]
            shift = (k - 1) * 0.12
            ax.plot(mine["layer"] + shift, mine["ratio"], alpha=0.8, ms=4, **_look((layout, 64), color))
            logs = np.log(mine["ratio"]).groupby(mine["layer"]).mean()
            ax.plot(logs.index + shift, np.exp(logs), color=color, lw=0.8, alpha=0.6)
        ax.axhline(1, color="0.3", ls=":", lw=1)
        ax.tick_params(labelsize=7)
        ax.set_xticks(sorted(rows.loc[rows["family"] == family, "layer"].unique()))
        ax.set_title(f"{NAMES[family]}:\n{summary.WORDS[quantity]}", fontsize=8)
        ax.set_xlabel("layer", fontsize=8)
    axes[0, 0].set_ylabel("target's patches / other shapes'", fontsize=8)
    legend(figure, {layout: _look((layout, 64), "0.3") for layout in LAYOUTS})
    return figure
