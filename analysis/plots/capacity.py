"""Draws the tables of `probes.suite.capacity`: facts answered of those shown, where these stand, and what
each layer's state answers by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.plots.common import BELOW, SHARES, families, family_looks, layer_panels, shown
from ssm_retrieval.style import CONTROLS, FAMILIES, NAMES, NEUTRAL, family_colors, legend, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {"facts": "symbols found, each being asked for", "place": "accuracy of the answer"}
AXES = {"facts": "context symbols shown", "place": "place in the whole context (1 = the first)"}
ALL = dict(color=NEUTRAL, lw=1.0)  # the diagonal


def facts_table(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the left panel: a series per family and weights, sorted by symbols shown."""
    return shown(table, ["shown"], part=["facts"], family=FAMILIES, weights=BELOW)


def place_table(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the right panel, after the whole context: a series per family and weights, sorted by place.

    Column at is where a place stands on the axis. The cells of a long context have as much room each.
    """
    longest = table[table["shown"] == table["shown"].max()]
    rows = shown(longest, ["place"], part=["place"], family=FAMILIES, weights=BELOW)
    places = sorted(rows["place"].unique())
    return rows.assign(at=rows["place"].map({place: i for i, place in enumerate(places)}))


def place_ticks(rows: pd.DataFrame) -> tuple[list[float], list[str]]:
    """Ticks of the axis of places, at most 7, and their labels: the first symbol of each cell, from 1 on."""
    places = rows.drop_duplicates("place").sort_values("at")[["at", "place"]].to_numpy()
    places = places[:: -(-len(places) // 7)]
    return [float(at) for at, _ in places], [f"{place + 1:g}" for _, place in places]


def draw(table: pd.DataFrame) -> Figure:
    """Facts answered against facts shown (left), and accuracy by place after the whole context (right)."""
    parts = {"facts": facts_table(table), "place": place_table(table)}
    figure, axes = panels(1, 2, size=(4.0, 3.4))
    for ax, (part, rows) in zip(axes[0], parts.items(), strict=True):
        x = "shown" if part == "facts" else "at"
        for (family, weights), line in rows.groupby(["family", "weights"], sort=False):
            look: dict[str, Any] = dict(marker="o", ms=4) if part == "facts" else dict(lw=1.5)
            if weights == "untrained":
                look = CONTROLS["untrained weights"] | (dict(mfc="none") | look if part == "facts" else {})
            look |= dict(color=family_colors()[str(family)])
            ax.plot(line[x], line["value"], **look)
            ax.fill_between(line[x], line["low"], line["high"], color=look["color"], alpha=0.15, lw=0)
        chance = rows.groupby(x)["chance"].mean()
        ax.plot(chance.index, chance, **CONTROLS["chance"])
        ax.set(xlabel=AXES[part], ylabel=UNITS[part])
    left, right = axes[0]
    lengths = sorted(parts["facts"]["shown"].unique())
    marked = [n for n in lengths if n == lengths[-1] or n <= lengths[-1] / 1.5]
    left.plot(lengths, parts["facts"].groupby("shown")["asked"].mean(), **ALL)
    left.set_xscale("log", base=2)
    left.set_yscale("symlog", base=2, linthresh=1)  # untrained weights answer none
    left.set_xticks(marked, [f"{n:g}" for n in marked])
    left.set_yticks([0, 1, *marked], [f"{n:g}" for n in (0, 1, *marked)])
    left.set_ylim(-0.3, 1.4 * lengths[-1])
    right.set_xticks(*place_ticks(parts["place"]))
    right.set_ylim(*SHARES)
    looks = family_looks(families(parts["facts"]), marker="o")
    looks["untrained weights"] = CONTROLS["untrained weights"] | dict(marker="o", mfc="none")
    legend(figure, looks | {"all of them": ALL, "chance": CONTROLS["chance"]})
    return figure


def projection_table(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `draw_projection`: maps of trained weights, by family and layer; none without states."""
    return shown(table, ["layer", "place", "answer"], part=["map"], family=FAMILIES, weights=["trained"])


def draw_projection(table: pd.DataFrame) -> Figure | None:
    """What each state answers by itself: symbol asked for by place answered, a panel per layer.

    On the diagonal it is right. None if no family has states.
    """
    maps = projection_table(table)
    if maps.empty:
        return None
    figure, axes = layer_panels(maps, rows=1, size=(2.9, 2.7))
    right = table[(table["part"] == "projection") & (table["weights"] == "trained")]
    accuracy = right.set_index(["family", "layer"])["value"]
    image: Any = None
    for i, family in enumerate(families(maps)):
        for j, (layer, part) in enumerate(maps[maps["family"] == family].groupby("layer")):
            grid = part.pivot_table(index="place", columns="answer", values="value", dropna=False)
            ax = axes[i, j]
            ax.set_axis_on()
            image = ax.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="equal", interpolation="nearest")
            for axis, edges in ((ax.yaxis, grid.index), (ax.xaxis, grid.columns)):
                chosen = range(0, len(edges), -(-len(edges) // 5))
                axis.set_ticks(chosen, [f"{float(edges[k]) + 1:g}" for k in chosen])
            ax.tick_params(labelbottom=True, labelleft=True)
            ax.grid(False)
            ax.set_title(f"{NAMES[family]}, layer {layer:g}: {accuracy[family, layer]:.2f} right", fontsize=9)
            ax.set_xlabel("place that its state answers")
            if j == 0:
                ax.set_ylabel("place of the symbol asked for")
    figure.colorbar(image, ax=axes, shrink=0.8, aspect=30, label="share of the answers")
    return figure
