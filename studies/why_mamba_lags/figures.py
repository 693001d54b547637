"""The figures of this study, drawn from its tidy table (contrasts.py makes it and calls `write`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ssm_retrieval.style import NAMES, family_colors, legend, panels, save, theme
from studies.why_mamba_lags import contrasts

TITLES = {
    "write": "written by the target\n/ by a distractor",
    "kept": "kept of what the target wrote\n/ of what distractors wrote",
    "share": "target's part of the state\n/ a distractor's, at the answer",
}
LAYOUT_LOOKS: dict[str, dict[str, Any]] = {
    "suffix": dict(linestyle="--", marker="s", mfc="white"),
    "prefix": dict(linestyle="-", marker="o"),
}
SOURCES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {  # of the answer, by where a patch is made
    "both context symbols, one patch": ((contrasts.TOGETHER,), dict(color="0.25", marker="s")),
    "last token": (("last", "query"), dict(color="#d55e00", marker="o")),
}


def write(table: pd.DataFrame) -> None:
    """Every figure of the study as PNG and PDF beside this file."""
    import matplotlib

    matplotlib.use("Agg")
    makers = {"contrast": contrast, "where": where, "lost": lost}
    with theme():
        for name, make in makers.items():
            save(make(table), Path(__file__).with_name(name))


def contrast(table: pd.DataFrame) -> Any:
    """Target over distractor by layer: rows are families, points seeds."""
    part = contrasts.cells(table, queries="single", weights="trained", quantity=tuple(TITLES))
    models = contrasts.SSM
    figure, axes = panels(len(models), len(TITLES), size=(3.2, 2.5), sharex=True, sharey="col")
    for (i, j), ax in np.ndenumerate(axes):
        model, (quantity, title) = models[i], list(TITLES.items())[j]
        for layout, look in LAYOUT_LOOKS.items():
            cell = part[
                (part["model"] == model) & (part["layout"] == layout) & (part["quantity"] == quantity)
            ]
            color = family_colors()[model]
            ax.plot(cell["layer"], cell["value"], ".", color=color, alpha=0.5)
            logs = cell["value"].astype(float).map(np.log).groupby(cell["layer"]).mean()
            ax.plot(logs.index, np.exp(logs), color=color, label=contrasts.LAYOUTS[layout], **look)
        ax.axhline(1, color="0.4", linestyle=":", lw=1)
        low, high = part.loc[part["quantity"] == quantity, "value"].agg(["min", "max"])
        ax.set(yscale="log", ylim=(min(0.5, low / 1.5), max(2, 1.5 * high)))
        layers = sorted(part["layer"].unique())
        ax.set_xticks(layers, [f"{layer + 1}" for layer in layers])
        if i == 0:
            ax.set_title(title, fontsize=9)
        if i == len(models) - 1:
            ax.set_xlabel("layer")
        if j == 0:
            ax.set_ylabel(f"{NAMES[model]}\nratio (log)")
            ax.legend(fontsize=8)
    return figure


def where(table: pd.DataFrame) -> Any:
    """Residual stream patched from the clean run: what which tokens carry after how many blocks."""
    settings = contrasts.settings(table)
    figure, axes = panels(1, len(settings), size=(2.5, 2.9), sharey=True)
    for ax, (name, part) in zip(axes[0], settings, strict=True):
        moved = part[part["site"] == "residual"]
        for roles, look in SOURCES.values():
            some = moved[(moved["quantity"] == "moved") & moved["role"].isin(roles)]
            some = some.groupby(["run", "layer"], observed=True)["value"].sum().reset_index()
            ax.plot(some["layer"], some["value"], ".", color=look["color"], alpha=0.4)
            mean = some.groupby("layer")["value"].mean()
            ax.plot(mean.index, mean, lw=1.5, **look)
        apart = moved[moved["quantity"] == "moved, unrelated"].groupby(["run", "layer"], observed=True)
        control = apart["value"].mean().groupby("layer").mean()
        ax.plot(control.index, control, color="0.6", ls=":", lw=1.2)
        ax.set_title(name.replace(", ", "\n"), fontsize=9)
        ax.set_xlabel("blocks done")
        ax.set_xticks(sorted(some["layer"].unique()))
    axes[0, 0].set_ylabel("share of the logit\ndifference restored", fontsize=9)
    looks = {name: look for name, (_, look) in SOURCES.items()}
    looks["control: another run's activations"] = dict(color="0.6", ls=":")
    legend(figure, looks, width=2.6)
    return figure


def lost(table: pd.DataFrame) -> Any:
    """What is left of a symbol, by how long ago it was read: query last."""
    models = contrasts.SSM
    figure, axes = panels(2, len(models), size=(4.0, 2.7), sharex=True, sharey="row")
    for j, model in enumerate(models):
        part = contrasts.cells(table, model=model, layout="suffix", queries="dense")
        color = family_colors()[model]
        asked = contrasts.cells(part, quantity="read out", weights="trained")
        _range(axes[0, j], contrasts.LENGTH - asked["lag"], asked["value"], dict(color="0.15"))
        decoded = contrasts.cells(part, quantity="decoded", site="state")
        for weights, look in (("trained", dict(marker=".")), ("untrained", dict(ls=":"))):
            best = contrasts.best_layer(decoded[decoded["weights"] == weights], ["lag"])
            _range(axes[0, j], best["lag"] + 1, best["value"], dict(look, color=color))
        kept = contrasts.cells(part, quantity="kept curve", role="distractor", weights="trained")
        best = contrasts.best_layer(kept, ["lag"])
        _range(axes[1, j], best["lag"], best["value"], dict(color=color, marker="."))
        axes[0, j].set_title(NAMES[model], color=color)
        axes[1, j].set_xlabel("symbols since")
        axes[1, j].set_ylim(-0.03, 1.03)
    axes[0, 0].set_ylabel("which place it had (model),\nwhich symbol it was (probe)", fontsize=9)
    axes[0, 0].set_ylim(-0.03, 1.03)
    axes[1, 0].set_ylabel("share of its write\nleft (exact)", fontsize=9)
    looks: dict[str, dict[str, Any]] = {
        "the model, asked for it": dict(color="0.15"),
        "linear probe of the state": dict(color="0.5", marker="."),
        "the same, untrained weights": dict(color="0.5", ls=":"),
    }
    legend(figure, looks)
    return figure


def _range(ax: Any, x: pd.Series, y: pd.Series, look: dict[str, Any]) -> None:
    """Mean over seeds and their range by x."""
    groups = y.astype(float).groupby(x)
    mean = groups.mean()
    ax.plot(mean.index, mean, lw=1.5, **look)
    ax.fill_between(mean.index, groups.min(), groups.max(), color=look["color"], alpha=0.12, lw=0)
