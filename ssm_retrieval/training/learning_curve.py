"""The learning curve of one run, from the tidy table of `synthetic.run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from ssm_retrieval.errors import UserError
from ssm_retrieval.style import NAMES, family_colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def learning_curve(metrics: pd.DataFrame, title: str = "") -> Figure:
    """Held-out accuracy at the full length, and the length in training, against tokens seen.

    The band is the 95 % Wilson interval of each evaluation.

    Args:
        metrics: rows of metrics.jsonl (columns model, tokens, length, train_length, accuracy, ci_low,
            ci_high, chance).
        title: of the figure; by default it names the length.

    Returns:
        A figure of two axes.

    Raises:
        UserError: if there is no row.
    """
    import matplotlib.pyplot as plt
    import seaborn

    if metrics.empty:
        raise UserError("metrics has no rows: nothing was evaluated yet")
    full = metrics[metrics["length"] == metrics["length"].max()]
    with seaborn.axes_style("whitegrid"), seaborn.plotting_context("notebook"):
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(7.2, 6.4), sharex=True, height_ratios=(2, 1), layout="constrained"
        )
        _accuracy(full, top)
        _lengths(full, bottom)
        top.set_title(title or f"Retrieval of a position out of {int(full['length'].iloc[0])}")
    return figure


def _accuracy(full: pd.DataFrame, axes: Axes) -> None:
    for family, rows in full.groupby("model", sort=False):
        rows = rows.sort_values("tokens")
        x, color = rows["tokens"] / 1e6, family_colors()[str(family)]
        axes.plot(x, rows["accuracy"], color=color, label=NAMES[str(family)], marker="o", markersize=3)
        axes.fill_between(x, rows["ci_low"], rows["ci_high"], color=color, alpha=0.2, linewidth=0)
    chance = float(full["chance"].iloc[0])
    axes.axhline(chance, color="0.4", linestyle="--", linewidth=1, label=f"chance ({chance:.2g})")
    split = "validation" if "validation" in set(full.get("split", ())) else "held-out"
    axes.set(ylim=(-0.03, 1.03), ylabel=f"{split} accuracy\n(single query, full length)")
    axes.legend(loc="center right", frameon=True)


def _lengths(full: pd.DataFrame, axes: Axes) -> None:
    for family, rows in full.groupby("model", sort=False):
        rows = rows.sort_values("tokens")
        axes.step(
            rows["tokens"] / 1e6, rows["train_length"], where="post", color=family_colors()[str(family)]
        )
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="training tokens (millions)", ylabel="context length\nin training")
