"""The figures of this study, drawn from its table of scores (summary.py calls them)."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ssm_retrieval.statistics import mean_interval
from ssm_retrieval.style import DOUBLE, NAMES, family_colors, legend
from studies.vlm_retrieval import summary

GUESSED = "best guess"
SHOWN = {
    "grounding": "grounding",
    "grounding-combination": "grounding,\nnew combinations",
    "attribute": "attribute",
    "existence": "existence",
}


def held(found: pd.DataFrame) -> Any:
    """Boxes found by shapes in a scene, by known and new combinations, and by patches, as far as measured.

    Dots are seeds, lines go through their means.
    """
    import matplotlib.pyplot as plt

    known = set(found["cell"])
    panels: dict[str, dict[str, tuple[str, str]]] = {
        "shapes in a scene": {str(n): ("base", task) for n, task in summary.BY_SHAPES.items()},
        "colour with shape": {"known": ("base", "grounding"), "new": ("base", "grounding-combination")},
        "patches of a picture": {
            str(n): (cell, "grounding") for n, cell in summary.BY_PATCHES.items() if cell in known
        },
    }
    panels = {what: cells for what, cells in panels.items() if len(cells) > 1}
    figure, axes = plt.subplots(1, len(panels), figsize=(DOUBLE, 3.0), sharey=True)
    shown = [family for family in summary.FAMILIES if (found["family"] == family).any()]
    for ax, (what, cells) in zip(axes, panels.items(), strict=True):
        _guess(ax, [_best(found, task) for _, task in cells.values()])
        for k, family in enumerate(shown):
            color, shift = family_colors()[family], 0.09 * (k - (len(shown) - 1) / 2)
            by_cell = [summary.of(found, cell, family, task) for cell, task in cells.values()]
            values = {i + shift: mine for i, mine in enumerate(by_cell) if mine.size}
            for x, mine in values.items():
                ax.plot([x] * mine.size, mine, ".", ms=3, color=color, alpha=0.5)
            ax.plot([*values], [mine.mean() for mine in values.values()], "o-", ms=4, lw=1, color=color)
        ax.set_xticks(range(len(cells)), list(cells))
        ax.set(xlabel=what, ylim=(0, 102))
    axes[0].set_ylabel("boxes found, per cent")
    looks = {NAMES[family]: dict(marker="o", color=family_colors()[family]) for family in shown}
    legend(figure, looks | {GUESSED: dict(color="0.3", ls=":")})
    return figure


def layouts(found: pd.DataFrame) -> Any:
    """Right answers of the paper's two families by where the image stands: means, 95 % intervals, seeds."""
    import matplotlib.pyplot as plt

    cells = [cell for cell in (summary.FIRST, *summary.LAYOUTS) if (found["cell"] == cell).any()]
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(DOUBLE * 1.25, 3.0), sharey=True)
    for ax, (task, title) in zip(axes, SHOWN.items(), strict=True):
        _guess(ax, [_best(found, task)] * len(cells))
        for k, family in enumerate(summary.PAPER):
            for i, cell in enumerate(cells):
                mine = summary.of(found, cell, family, task)
                if mine.size < 2:
                    continue
                x, color = i + 0.2 * (k - 0.5), family_colors()[family]
                mean, low, high = mean_interval(mine.to_numpy())
                ax.plot([x] * mine.size, mine, ".", ms=3, color=color, alpha=0.4)
                ax.errorbar(x, mean, [[mean - low], [high - mean]], fmt="o", ms=4, color=color, lw=1.2)
        ax.set_xticks(range(len(cells)), cells, rotation=35, ha="right", fontsize=7)
        ax.set_title(title, fontsize=8)
        ax.set_ylim(0, 102)
    axes[0].set_ylabel("right answers, per cent")
    looks = {
        NAMES[family]: dict(marker="o", ls="", color=family_colors()[family]) for family in summary.PAPER
    }
    legend(figure, looks | {GUESSED: dict(color="0.3", ls=":")})
    return figure


def _best(found: pd.DataFrame, task: str) -> float:
    return float(found.loc[found["task"] == task, "guess"].max())


def _guess(ax: Any, guesses: list[float]) -> None:
    for i, guess in enumerate(guesses):
        ax.plot([i - 0.35, i + 0.35], [guess, guess], color="0.3", ls=":", lw=1.2)
