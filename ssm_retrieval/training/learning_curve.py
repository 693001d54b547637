"""What `synthetic.run` draws from its tidy tables: learning curves, and accuracy against context length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pandas as pd

from ssm_retrieval.errors import UserError
from ssm_retrieval.style import CONTROLS, FAMILIES, NAMES, family_colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


TOKENS = "training tokens (millions)"
LENGTH = "context length in training"


def curve_table(metrics: pd.DataFrame, length: int | None = None) -> pd.DataFrame:
    """Choose and order the rows of a learning curve.

    Args:
        metrics: Rows of metrics.jsonl.
        length: The length that was evaluated; by default the longest in the table.

    Returns:
        The rows of that length, model by model in the order of every figure, sorted by tokens. Column
        millions is the x axis.
    """
    rows = metrics[metrics["length"] == (metrics["length"].max() if length is None else length)]
    return in_order(rows.assign(millions=rows["tokens"] / 1e6), "tokens")


def in_order(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    """Rows model by model, in the order of every figure, and sorted by a column within each."""
    places = {name: i for i, name in enumerate(FAMILIES)}
    rows = rows.assign(_place=rows["model"].map(places))
    return rows.sort_values(["_place", by], kind="stable", ignore_index=True).drop(columns="_place")


def length_axis(lengths: Iterable[int]) -> tuple[list[int], tuple[float, float]]:
    """Ticks of a logarithmic axis of lengths (at most 6 of them, the longest always), and its limits."""
    there = sorted(set(lengths), reverse=True)
    return there[:: -(-len(there) // 6)][::-1], (there[-1] / 1.2, there[0] * 1.2)


def learning_curve(metrics: pd.DataFrame, title: str = "") -> Figure:
    """Draw held-out accuracy at the full length, and the length in training, against tokens seen.

    The band is the 95 % Wilson interval of each evaluation.

    Args:
        metrics: Rows of metrics.jsonl (columns model, tokens, length, train_length, accuracy, ci_low,
            ci_high, chance).
        title: Of the figure; by default it names the task and the length.

    Returns:
        The figure.

    Raises:
        UserError: There is no row.
    """
    import matplotlib.pyplot as plt
    import seaborn

    if metrics.empty:
        raise UserError("metrics has no rows: nothing was evaluated yet")
    full = curve_table(metrics)
    with seaborn.axes_style("whitegrid"), seaborn.plotting_context("notebook"):
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(7.2, 6.4), sharex=True, height_ratios=(2, 1), layout="constrained"
        )
        _learning(full, top, bottom)
        top.set_title(title or f"Retrieval of a position out of {int(full['length'].iloc[0])}")
    return figure


def outcome(by_length: pd.DataFrame, metrics: pd.DataFrame) -> Figure:
    """Draw what runs have learned beside how they got there.

    Left is the held-out accuracy of the trained models at every context length, with its 95 % Wilson
    interval; right are the learning curves of `learning_curve`.

    Args:
        by_length: Rows of by_length.jsonl of all runs (columns model, length, accuracy, ci_low, ci_high,
            chance).
        metrics: Rows of metrics.jsonl of all runs.

    Returns:
        The figure.

    Raises:
        UserError: There is no row in one of the tables.
    """
    import matplotlib.pyplot as plt
    import seaborn

    if metrics.empty or by_length.empty:
        raise UserError("a run has no evaluations to draw; train it first")
    full = curve_table(metrics)
    with seaborn.axes_style("whitegrid"), seaborn.plotting_context("notebook"):
        figure, axes = plt.subplot_mosaic(
            [["length", "accuracy"], ["length", "training"]],
            figsize=(11.5, 5.2),
            height_ratios=(2, 1),
            layout="constrained",
        )
        axes["accuracy"].sharex(axes["training"])
        axes["accuracy"].tick_params(labelbottom=False)
        _by_length(by_length, axes["length"])
        _learning(full, axes["accuracy"], axes["training"])
        axes["length"].set_title("What was learned")
        axes["accuracy"].set_title("How it was learned")
    return figure


def _by_length(by_length: pd.DataFrame, axes: Axes) -> None:
    rows = in_order(by_length, "length")
    for family, own in rows.groupby("model", sort=False):
        color = family_colors()[str(family)]
        axes.plot(own["length"], own["accuracy"], color=color, label=NAMES[str(family)], marker="o", ms=4)
        axes.fill_between(own["length"], own["ci_low"], own["ci_high"], color=color, alpha=0.2, linewidth=0)
    chance = rows.drop_duplicates("length").sort_values("length")
    axes.plot(chance["length"], chance["chance"], **CONTROLS["chance"], label="chance")
    axes.set_xscale("log", base=2)
    ticks, (low, high) = length_axis(rows["length"])
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlim=(low, high), ylim=(-0.03, 1.03), xlabel="context length (symbols)")
    axes.set_ylabel("held-out accuracy (single query)")
    axes.legend(loc="center left", frameon=True)


def _learning(full: pd.DataFrame, top: Axes, bottom: Axes) -> None:
    _accuracy(full, top)
    _lengths(full, bottom)


def _accuracy(full: pd.DataFrame, axes: Axes) -> None:
    for family, rows in full.groupby("model", sort=False):
        x, color = rows["millions"], family_colors()[str(family)]
        axes.plot(x, rows["accuracy"], color=color, label=NAMES[str(family)], marker="o", markersize=3)
        axes.fill_between(x, rows["ci_low"], rows["ci_high"], color=color, alpha=0.2, linewidth=0)
    chance = float(full["chance"].iloc[0])
    axes.axhline(chance, **CONTROLS["chance"], label=f"chance ({chance:.2g})")
    split = "validation" if "validation" in set(full.get("split", ())) else "held-out"
    axes.set(ylim=(-0.03, 1.03), ylabel=f"{split} accuracy\n(single query, full length)")
    axes.legend(loc="center right", frameon=True)


def _lengths(full: pd.DataFrame, axes: Axes) -> None:
    for family, rows in full.groupby("model", sort=False):
        axes.step(rows["millions"], rows["train_length"], where="post", color=family_colors()[str(family)])
    axes.set_yscale("log", base=2)
    # the goal is one of them; powers of two alone may leave a short run without a tick
    ticks, limits = length_axis([*full["train_length"], *full["length"]])
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(*limits)
    axes.set(xlabel=TOKENS, ylabel=LENGTH.replace(" in ", "\nin "))
