"""What figures of probes share: families in order, error bars, logarithmic axes and maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ssm_retrieval.style import FAMILIES, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def families(table: pd.DataFrame) -> list[str]:
    """Those in the table, in the order of every figure."""
    there = set(table["family"])
    return [name for name in FAMILIES if name in there]


def error_bars(part: pd.DataFrame) -> np.ndarray:
    """(2, rows) lengths for matplotlib; none where there is no interval."""
    bars = np.stack([part["value"] - part["low"], part["high"] - part["value"]])
    return np.nan_to_num(bars, posinf=0).clip(min=0)


def plain_log(axis: Any) -> None:
    """Ticks of a log axis as plain numbers, at 1, 2 and 5 times powers of ten where few of those are seen."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    subs = (1.0, 2.0, 5.0) if low > 0 and high / low < 100 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def grid_of(part: pd.DataFrame) -> np.ndarray:
    """The map that `map_rows` took apart; nan above the diagonal."""
    return part.pivot_table(index="query", columns="key", values="value").to_numpy()


def map_panels(maps: pd.DataFrame, words: tuple[str, str], unit: str, decorate: Any) -> Figure:
    """Maps of one sequence on a common log scale: a row per family, a panel per layer.

    words: labels of the key and the query axis; unit: of the colour bar; decorate(ax, family, layer, part)
    adds title and marks.
    """
    from matplotlib.colors import LogNorm

    names = families(maps)
    count = max(maps.loc[maps["family"] == name, "layer"].nunique() for name in names)
    figure, axes = panels(len(names), count, size=(2.7, 2.7))
    image = None
    for ax in axes.flat:
        ax.set_axis_off()
    for i, family in enumerate(names):
        for j, (layer, part) in enumerate(maps[maps["family"] == family].groupby("layer")):
            ax = axes[i, j]
            ax.set_axis_on()
            image = ax.imshow(grid_of(part).clip(1e-4), norm=LogNorm(1e-4, 1), cmap="viridis", aspect="equal")
            map_axes(ax, part)
            ax.set_xlabel(words[0])
            if j == 0:
                ax.set_ylabel(words[1])
            decorate(ax, family, layer, part)
    figure.colorbar(image, ax=axes, shrink=0.8, aspect=30, label=unit)
    return figure


def map_axes(ax: Any, part: pd.DataFrame) -> None:
    """Ticks of a map in tokens."""
    starts = np.sort(part["query"].unique())
    chosen = np.linspace(0, len(starts) - 1, min(5, len(starts))).round().astype(int)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(chosen, [f"{starts[i]:.0f}" for i in chosen])
    ax.grid(False)
