"""What figures of probes share: which rows they show and in which order, error bars, axes and maps.

A figure has one tidy table: `*_table` of its module chooses and orders the rows of a probe's table, and both
the drawing here and the one of `analysis.report` show exactly those.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probes.suite.common import WEIGHTS
from ssm_retrieval.style import FAMILIES, NAMES, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BELOW = tuple(reversed(WEIGHTS))  # controls are drawn first, so that what was learned lies on top
SITE_WORDS = {"residual": "residual stream", "state": "SSM state", "head": "attention heads"}
MAP_LIMITS = (1e-4, 1.0)  # of the colours of attention maps, logarithmic
SHARES = (-0.03, 1.03)  # limits of an axis from 0 to 1


def shown(table: pd.DataFrame, by: Sequence[str] = (), **order: Collection[Any]) -> pd.DataFrame:
    """Choose and order the rows of a figure; only trained weights keep their intervals.

    Args:
        table: A probe's table, of all families.
        by: Columns to sort by within a series, such as the x axis.
        **order: Column = the values to show, in the order in which they are drawn.

    Returns:
        The rows, with a new index. `low` and `high` of untrained weights are nan.
    """
    places = {f"_{name}": {v: i for i, v in enumerate(values)} for name, values in order.items()}
    for name, values in order.items():
        table = table[table[name].isin(list(values))]
    table = table.assign(**{key: table[key[1:]].map(place) for key, place in places.items()})
    table = table.sort_values([*places, *by], kind="stable", ignore_index=True).drop(columns=list(places))
    table.loc[table["weights"] != "trained", ["low", "high"]] = np.nan
    return table


def families(table: pd.DataFrame) -> list[str]:
    """Those in the table, in the order of every figure."""
    there = set(table["family"])
    return [name for name in FAMILIES if name in there]


def role_words(role: str) -> str:
    """The name of a token's role in a figure: `query_marker` is "query marker"."""
    return role.replace("_", " ")


def shuffled_means(part: pd.DataFrame, by: str) -> pd.Series:
    """Mean accuracy with shuffled labels over layers or families, by another column."""
    return part[part["weights"] == "trained"].groupby(by)["shuffled"].mean()


def error_bars(part: pd.DataFrame) -> np.ndarray:
    """(2, rows) lengths for matplotlib; 0 where there is no interval."""
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


def layer_panels(table: pd.DataFrame, rows: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """Make a figure with `rows` rows for each family and a column for each layer; panels stay off.

    Args:
        table: Rows of the figure, with columns family and layer.
        rows: Rows of panels for each family.
        size: Width and height of a panel in inches.

    Returns:
        The figure, and its axes (families * rows, layers).
    """
    names = families(table)
    count = max(table.loc[table["family"] == name, "layer"].nunique() for name in names)
    figure, axes = panels(len(names) * rows, count, size=size, sharex=True, sharey="row")
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def grid_of(part: pd.DataFrame) -> np.ndarray:
    """A map as (queries, keys), put together from its rows; nan above the diagonal."""
    return part.pivot_table(index="query", columns="key", values="value").to_numpy()


def target_cell(part: pd.DataFrame) -> int | None:
    """The column of a map that holds the target; None if the table does not say."""
    target = part["target"].iloc[0]
    starts = np.sort(part["query"].unique())
    return int(np.searchsorted(starts, target, side="right")) - 1 if np.isfinite(target) else None


def map_panels(maps: pd.DataFrame, words: tuple[str, str], unit: str, decorate: Any) -> Figure:
    """Draw maps of one sequence on a common log scale: a row per family, a panel per layer.

    Args:
        maps: Rows of maps, see `grid_of`.
        words: Labels of the key axis and the query axis.
        unit: Label of the colour bar.
        decorate: `decorate(ax, family, layer, part)` adds title and marks.

    Returns:
        The figure.
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
            grid = grid_of(part).clip(MAP_LIMITS[0])
            image = ax.imshow(grid, norm=LogNorm(*MAP_LIMITS), cmap="viridis", aspect="equal")
            map_axes(ax, part)
            ax.set_xlabel(words[0])
            if j == 0:
                ax.set_ylabel(words[1])
            decorate(ax, family, layer, part)
    figure.colorbar(image, ax=axes, shrink=0.8, aspect=30, label=unit)
    return figure


def map_axes(ax: Any, part: pd.DataFrame) -> None:
    """Ticks of a map, in tokens."""
    starts = np.sort(part["query"].unique())
    chosen = np.linspace(0, len(starts) - 1, min(5, len(starts))).round().astype(int)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(chosen, [f"{starts[i]:.0f}" for i in chosen])
    ax.grid(False)


def family_looks(names: Iterable[str], words: str = "{}", **look: Any) -> dict[str, dict[str, Any]]:
    """Entries of a legend, one for each family, in its colour.

    Args:
        names: Families.
        words: The label, where {} is the family's name.
        **look: Further properties of matplotlib's line.

    Returns:
        Label -> properties, as `ssm_retrieval.style.legend` takes them.
    """
    from ssm_retrieval.style import family_colors

    colors = family_colors()
    return {words.format(NAMES[name]): dict(color=colors[name], **look) for name in names}
