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
    """Grounding by what must be held: the number of shapes, and of patches; dots are seeds, lines means."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(DOUBLE, 3.0), sharey=True)
    by_shapes = {n: ("base", task) for n, task in summary.BY_SHAPES.items()}
    by_patches = {n: (cell, "grounding") for n, cell in summary.BY_PATCHES.items()}
    for ax, cells, what in (
        (left, by_shapes, "shapes in a scene"),
        (right, by_patches, "patches of a picture"),
    ):
        _guess(ax, [_best(found, task) for _, task in cells.values()])
        for k, family in enumerate(summary.FAMILIES):
            values = {
                i: summary.of(found, *cell[:1], family, cell[1]) for i, cell in enumerate(cells.values())
            }
            values = {i: mine for i, mine in values.items() if mine.size}
            color, shift = family_colors()[family], 0.07 * (k - 1.5)
            for i, mine in values.items():
                ax.plot([i + shift] * mine.size, mine, ".", ms=3, color=color, alpha=0.5)
            means = [mine.mean() for mine in values.values()]
            ax.plot([i + shift for i in values], means, "o-", ms=4, lw=1, color=color)
        ax.set_xticks(range(len(cells)), [str(number) for number in cells])
        ax.set(xlabel=what, ylim=(0, 102))
    left.set_ylabel("boxes found, per cent")
    looks = {NAMES[f]: dict(marker="o", color=family_colors()[f]) for f in summary.FAMILIES if _has(found, f)}
    legend(figure, looks | {GUESSED: dict(color="0.3", ls=":")})
    return figure


def layouts(found: pd.DataFrame) -> Any:
    """Right answers of the paper's two families by where the image stands: means, 95 % intervals, seeds."""
    import matplotlib.pyplot as plt

    cells = ("base", *summary.LAYOUTS)
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
        names = ["image first" if cell == "base" else cell for cell in cells]
        ax.set_xticks(range(len(cells)), names, rotation=35, ha="right", fontsize=7)
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


def _has(found: pd.DataFrame, family: str) -> bool:
    return bool((found["family"] == family).any())
