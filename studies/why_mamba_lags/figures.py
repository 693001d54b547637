"""The figures of this study, drawn from its tidy table (contrasts.py makes it and calls `write`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ssm_retrieval.statistics import geometric_mean_interval, mean_interval
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
    "context symbols (target's and partner's patch, summed)": (
        ("target", "partner"),
        dict(color="0.25", marker="s"),
    ),
    "last token": (("last", "query"), dict(color="#d55e00", marker="o")),
}


def write(table: pd.DataFrame) -> None:
    """Every figure of the study as PNG and PDF beside this file."""
    import matplotlib

    matplotlib.use("Agg")
    makers = {"contrast": contrast, "where": where, "lost": lost, "capacity": capacity}
    with theme():
        for name, make in makers.items():
            save(make(table), Path(__file__).with_name(name))


def contrast(table: pd.DataFrame) -> Any:
    """Target over distractor by layer at length 16: rows are families, points seeds."""
    part = contrasts.cells(table, seq_len=16, queries="single", weights="trained", quantity=tuple(TITLES))
    models = list(contrasts.USUAL_STATE)
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
        ax.set(yscale="log", xticks=sorted(part["layer"].unique()))
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
    """What the state still has of a symbol, by how long ago it was read: query last, lengths 8, 16, 32."""
    models, lengths = list(contrasts.USUAL_STATE), (8, 16, 32)
    shades = dict(zip(lengths, ("#9ecae1", "#4292c6", "#08306b"), strict=True))
    figure, axes = panels(2, len(models), size=(4.0, 2.7), sharex=True, sharey="row")
    for j, model in enumerate(models):
        for length in lengths:
            part = contrasts.cells(table, model=model, layout="suffix", queries="dense", seq_len=length)
            decoded = part[(part["quantity"] == "decoded") & (part["site"] == "state")]
            for weights, look in (("trained", dict(marker=".")), ("untrained", dict(ls=":"))):
                best = contrasts.best_layer(decoded[decoded["weights"] == weights], ["lag"])
                _band(axes[0, j], best["lag"] + 1, best["value"], dict(look, color=shades[length]))
            kept = part[(part["quantity"] == "kept curve") & (part["role"] == "distractor")]
            best = contrasts.best_layer(kept[kept["weights"] == "trained"], ["lag"])
            look = dict(color=shades[length], marker=".")
            _band(axes[1, j], best["lag"], best["value"], look, log=True)
        axes[0, j].set_title(NAMES[model], color=family_colors()[model])
        axes[1, j].set_xlabel("symbols since")
        axes[1, j].set(yscale="log", ylim=(0.03, 1.3))
    axes[0, 0].set_ylabel("probe accuracy:\nwhich symbol it was", fontsize=9)
    axes[0, 0].set_ylim(-0.03, 1.03)
    axes[1, 0].set_ylabel("share of its write\nleft (exact)", fontsize=9)
    looks: dict[str, dict[str, Any]] = {f"N = {n}": dict(color=c, marker=".") for n, c in shades.items()}
    legend(figure, looks | {"untrained weights": dict(color="0.4", ls=":")})
    return figure


def _band(ax: Any, x: pd.Series, y: pd.Series, look: dict[str, Any], log: bool = False) -> None:
    """Mean over seeds (log: geometric) and Student's interval by x."""
    interval = geometric_mean_interval if log else mean_interval
    bounds = pd.DataFrame({k: interval(v.to_numpy()) for k, v in y.astype(float).groupby(x)}).T
    ax.plot(bounds.index, bounds[0], lw=1.5, **look)
    ax.fill_between(bounds.index, bounds[1], bounds[2], color=look["color"], alpha=0.12, lw=0)


def capacity(table: pd.DataFrame) -> Any:
    """Symbols that a linear probe finds in the state, against its size and against the context's length."""
    part = contrasts.best_layer(
        contrasts.cells(
            table, any_state=True, quantity="tokens", site="state", layout="suffix", queries="dense"
        ),
        ["weights"],
    )
    figure, axes = panels(1, 2, size=(4.0, 3.2))
    left, right = axes[0]
    for model in contrasts.USUAL_STATE:
        color = family_colors()[model]
        for weights, look in (
            ("trained", dict(marker="o")),
            ("untrained", dict(marker="o", ls=":", mfc="white")),
        ):
            mine = part[(part["model"] == model) & (part["weights"] == weights)]
            size = mine[mine["seq_len"] == 16]
            _points(left, 256 * size["d_state"], size["value"], dict(look, color=color))
            usual = mine[mine["d_state"] == contrasts.USUAL_STATE[model]]
            _points(right, usual["seq_len"], usual["value"], dict(look, color=color))
            if weights == "trained":
                own = usual["accuracy"] * usual["seq_len"]
                _points(right, usual["seq_len"], own, dict(color=color, marker="x", ls="--"))
    left.axhline(16, color="0.4", lw=1, ls=":")
    left.set(xscale="log", xlabel="numbers in the state of a layer", ylabel="symbols recovered of N = 16")
    left.set_ylim(0, 17)
    right.plot([8, 32], [8, 32], color="0.4", lw=1, ls=":")
    right.set(xlabel="length of the context N", ylabel="symbols recovered", xticks=[8, 16, 32], ylim=(0, 33))
    looks = {
        f"{NAMES[m]}, linear probe of the state": dict(color=family_colors()[m], marker="o")
        for m in contrasts.USUAL_STATE
    }
    looks |= {
        "untrained weights": dict(color="0.4", marker="o", ls=":", mfc="white"),
        "the model itself (accuracy x N)": dict(color="0.4", marker="x", ls="--"),
        "all N": dict(color="0.4", ls=":"),
    }
    legend(figure, looks, width=2.7)
    return figure


def _points(ax: Any, x: pd.Series, y: pd.Series, look: dict[str, Any]) -> None:
    ax.plot(x, y, ".", color=look["color"], alpha=0.4)
    mean = y.astype(float).groupby(x).mean()
    ax.plot(mean.index, mean, lw=1.5, **look)
