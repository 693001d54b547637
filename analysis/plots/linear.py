"""Draws the tables of `probes.suite.linear`: what can be read off linearly, by lag and by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.plots.common import families
from probes.suite.common import WEIGHTS
from probes.suite.linear import SITES
from ssm_retrieval.style import NAMES, family_colors, legend, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_lags(table: pd.DataFrame) -> Figure:
    """Accuracy against lag, a panel per site and family: layers from light to dark, controls grey."""
    from matplotlib.ticker import MaxNLocator

    token, names = table[table["part"] == "token"], families(table)
    sites = [site for site in SITES if (token["site"] == site).any()]
    figure, axes = panels(len(sites), len(names), size=(3.4, 2.7), sharey=True)
    depth = int(token["layer"].max()) + 1
    for (i, j), ax in np.ndenumerate(axes):
        family, site = names[j], sites[i]
        mine = token[(token["family"] == family) & (token["site"] == site)]
        if mine.empty:
            ax.set_axis_off()
            continue
        layers = sorted(mine["layer"].unique())
        for weights in reversed(WEIGHTS):
            for layer in layers:
                part = mine[(mine["layer"] == layer) & (mine["weights"] == weights)].sort_values("lag")
                look: dict[str, Any] = dict(color=_shade(layer, depth), lw=1.5, marker=".")
                if weights == "untrained":
                    look = dict(color="0.6", lw=0.8, ls=":")
                ax.plot(part["lag"] + 1, part["value"], **look)
                if weights == "trained":
                    ax.fill_between(
                        part["lag"] + 1, part["low"], part["high"], color=look["color"], alpha=0.12, lw=0
                    )
        trained = mine[mine["weights"] == "trained"]
        shuffled = trained.groupby("lag")["shuffled"].mean()
        ax.plot(shuffled.index + 1, shuffled, color="0.2", lw=1, ls="--")
        ax.axhline(trained["chance"].iloc[0], color="0.4", ls=":", lw=1)
        ax.set(title=f"{NAMES[family]}, {site}", ylim=(-0.03, 1.03), xlabel="symbols since (1 = the last)")
        ax.title.set_color(family_colors()[family])
        if mine["lag"].max() > 32:
            _folded(ax, int(mine["lag"].max()) + 1)
        else:
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for row in axes:
        first = next(ax for ax in row if ax.axison)
        first.set_ylabel("test accuracy of\nthe symbol's identity", fontsize=9)
        first.tick_params(labelleft=True)
    looks: dict[str, dict[str, Any]] = {
        f"layer {k}": dict(color=_shade(k, depth), marker=".") for k in range(depth)
    }
    looks |= {
        "untrained weights": dict(color="0.6", ls=":"), "shuffled labels": dict(color="0.2", ls="--"),
        "chance": dict(color="0.4", ls=":"),
    }  # fmt: skip
    legend(figure, looks)
    return figure


def draw_answer(table: pd.DataFrame) -> Figure:
    """By layer: is the target's place decodable (left), and how many tokens are (right)?"""
    names = families(table)
    figure, axes = panels(1, 2, size=(4.8, 3.8))
    looks: dict[str, dict[str, Any]] = {}
    for ax, part_name in zip(axes[0], ("answer", "capacity"), strict=True):
        mine = table[table["part"] == part_name]
        for family in names:
            for site, marker in (("residual", "o"), ("state", "s")):
                for weights in WEIGHTS:
                    part = mine[
                        (mine["family"] == family) & (mine["site"] == site) & (mine["weights"] == weights)
                    ].sort_values("layer")
                    if part.empty:
                        continue
                    look: dict[str, Any] = dict(color=family_colors()[family], marker=marker, ms=5)
                    look |= (
                        dict(lw=1.5) if weights == "trained" else dict(lw=1, ls=":", mfc="none", alpha=0.8)
                    )
                    ax.plot(part["layer"], part["value"], **look)
                    if weights == "trained":
                        ax.fill_between(
                            part["layer"], part["low"], part["high"], color=look["color"], alpha=0.12, lw=0
                        )
                        looks[f"{NAMES[family]}, {site}"] = look
        ax.set(xlabel="layer")
        ax.set_xticks(sorted(mine["layer"].unique().astype(int)))
        shuffled = mine[mine["weights"] == "trained"].groupby("layer")["shuffled"].mean()
        ax.plot(shuffled.index, shuffled, color="0.2", lw=1, ls="--")
    answer = table[table["part"] == "answer"]
    axes[0, 0].axhline(answer["chance"].iloc[0], color="0.4", ls=":", lw=1)
    axes[0, 0].set_ylim(-0.03, 1.03)
    axes[0, 0].set_ylabel("accuracy: part of the context\nthat holds the target", fontsize=9)
    axes[0, 1].set_ylabel("expected number of\nsymbols recovered", fontsize=9)
    looks |= {
        "untrained weights": dict(color="0.4", ls=":", marker="o", mfc="none"),
        "shuffled labels": dict(color="0.2", ls="--"), "chance": dict(color="0.4", ls=":"),
    }  # fmt: skip
    legend(figure, looks)
    return figure


def _folded(ax: Any, n: int) -> None:
    """An x axis 1 .. n that is logarithmic from both ends."""
    middle = np.log2((n + 1) / 2)

    def there(x: Any) -> Any:
        x = np.clip(np.asarray(x, float), 0.5, n + 0.5)
        return np.where(x <= (n + 1) / 2, np.log2(x), 2 * middle - np.log2(n + 1 - x))

    def back(y: Any) -> Any:
        y = np.asarray(y, float)
        return np.where(y <= middle, 2.0**y, n + 1 - 2.0 ** (2 * middle - y))

    ends = [k for k in (1, 8, 64) if k < n / 4]
    ax.set_xscale("function", functions=(there, back))
    ax.set_xticks([*ends, *(n + 1 - k for k in reversed(ends))])
    ax.tick_params(axis="x", labelsize=7)


def _shade(k: int, count: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis_r"](0.15 + 0.8 * k / max(1, count - 1))
