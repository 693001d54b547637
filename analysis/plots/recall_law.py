"""Draws recall against the load of a state with the law that `analysis.capacity_law` fits, and how many facts
models recall against the numbers that they hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import ndtri

from analysis.capacity_law import CELL, facts_at, fit_constants, load, recall_at_load
from analysis.plots.common import SHARES, family_looks, plain_log
from ssm_retrieval.style import CONTROLS, FAMILIES, NAMES, faintness, family_colors, legend, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X"  # one for each width, from the smallest on
LOAD = "facts / (layers × N × D)"
CAPACITY = 0.95  # accuracy up to which facts count as recalled
SHAPE = ["task", "model", "n_layer", "d_model", "d_state", "vocab_size"]


def collapse_table(observations: pd.DataFrame) -> pd.DataFrame:
    """The points of `draw_collapse`, and the law that was fitted to each family.

    Args:
        observations: As for `analysis.capacity_law.fit_constant`, with a column model.

    Returns:
        One row per model and cell: load, accuracy (all seeds together), low and high (the worst and the best
        seed), seeds, law (what the fit expects), chance, and of the family's fit a, a_low, a_high and lapse.

    Raises:
        UserError: As `fit_constant`.
    """
    fits = fit_constants(observations).rename(columns={"low": "a_low", "high": "a_high"})
    rows = observations.assign(accuracy=observations["correct"] / observations["count"])
    cells = rows.groupby(["model", *CELL], as_index=False).agg(
        low=("accuracy", "min"),
        high=("accuracy", "max"),
        seeds=("seed", "nunique"),
        correct=("correct", "sum"),
        count=("count", "sum"),
    )
    table = cells.merge(fits[["model", "a", "a_low", "a_high", "lapse"]], on="model")
    table = table.assign(
        load=load(table["n_facts"], table["d_model"], table["d_state"], table["n_layer"]),
        accuracy=table["correct"] / table["count"],
        chance=1 / table["vocab_size"],
    )
    law = recall_at_load(table["load"], table["d_model"], table["vocab_size"], table["a"])
    return table.assign(law=(1 - table["lapse"]) * law)


def draw_collapse(table: pd.DataFrame) -> Figure:
    """Draw accuracy against the load: a column for each family, a row for each vocabulary.

    Points pool the seeds of a cell; their bars reach from the worst to the best seed. Lines are the fitted
    law, one for each width, because of its term 1 / D.

    Args:
        table: Result of `collapse_table`.

    Returns:
        The figure.
    """
    models = [name for name in FAMILIES if name in set(table["model"])]
    vocabularies, widths = (sorted(table[name].unique()) for name in ("vocab_size", "d_model"))
    looks = {
        D: dict(marker=MARKERS[i % len(MARKERS)], alpha=faintness(D, widths)) for i, D in enumerate(widths)
    }
    x = np.geomspace(table["load"].min() / 1.5, table["load"].max() * 1.5, 200)
    size = (3.2, 2.8)
    figure, axes = panels(len(vocabularies), len(models), size, sharex=True, sharey=True)
    for (i, j), ax in np.ndenumerate(axes):
        mine = table[(table["model"] == models[j]) & (table["vocab_size"] == vocabularies[i])]
        color = family_colors()[models[j]]
        for D, part in mine.groupby("d_model"):
            bars = [part["accuracy"] - part["low"], part["high"] - part["accuracy"]]
            ax.errorbar(part["load"], part["accuracy"], yerr=bars, color=color, ls="", ms=4, lw=1, **looks[D])
            fit = part.iloc[0]
            law = (1 - fit["lapse"]) * recall_at_load(x, D, vocabularies[i], fit["a"])
            ax.plot(x, law, color=color, lw=1.5, alpha=looks[D]["alpha"])
        ax.axhline(1 / vocabularies[i], **CONTROLS["chance"])
        ax.set(xscale="log", ylim=SHARES)
        if i == 0 and len(mine):
            fit = mine.iloc[0]
            words = f"a = {fit['a']:.3g}"
            words += "" if np.isnan(fit["a_low"]) else f" [{fit['a_low']:.3g}, {fit['a_high']:.3g}]"
            ax.set_title(f"{NAMES[models[j]]}\n{words}", fontsize=9)
        if i == len(vocabularies) - 1:
            ax.set_xlabel(LOAD)
        if j == 0:
            ax.set_ylabel(f"{vocabularies[i]} tokens\naccuracy")
    entries = {f"D = {D}": dict(color="0.3", ls="", **look) for D, look in looks.items()}
    legend(figure, entries | {"law": dict(color="0.3"), "chance": CONTROLS["chance"]}, width=1.2)
    return figure


def recalled(n_facts: Any, accuracy: Any, wanted: float = CAPACITY) -> tuple[float, bool]:
    """How many facts a model recalls with an accuracy, read off its curve.

    Args:
        n_facts: Numbers of facts at which the model was asked, ascending.
        accuracy: Accuracy at each of them.
        wanted: The accuracy, from 0 to 1.

    Returns:
        Where the curve first falls below `wanted`, interpolated between the probits of the accuracies in log
        n_facts, because both are nearly straight under the law; 0 if it begins below. The second value says
        whether it never does: the model then recalls at least as many as were tried.
    """
    n = np.asarray(n_facts, float)
    hits = ndtri(np.clip(np.asarray(accuracy, float), 1e-3, 1 - 1e-3))
    least = float(ndtri(wanted))
    low = hits < least
    if not low.any():
        return float(n[-1]), True
    i = int(low.argmax())
    if i == 0:
        return 0.0, False
    share = (hits[i - 1] - least) / (hits[i - 1] - hits[i])
    return float(n[i - 1] * (n[i] / n[i - 1]) ** share), False


def frontier_table(measured: pd.DataFrame, constants: pd.DataFrame | None = None) -> pd.DataFrame:
    """The points of `draw_frontier`: facts recalled with `CAPACITY`, and the numbers that hold them.

    Args:
        measured: A row for each seed, shape and number of facts, with the columns `SHAPE`, seed, n_facts,
            numbers (what the cache holds of so many facts), correct and count.
        constants: Result of `analysis.capacity_law.fit_constants` by task and model, for the law's curve.

    Returns:
        One row per shape: facts, numbers (medians of the seeds), low and high (the worst and the best seed),
        seeds, beyond (how many seeds recalled all that were tried), and law, what the fit expects; nan
        without a fit.
    """
    rows = []
    ordered = measured.assign(accuracy=measured["correct"] / measured["count"]).sort_values("n_facts")
    for shape, runs in ordered.groupby(SHAPE, dropna=False):
        found = []
        for _, curve in runs.groupby("seed"):
            n, more = recalled(curve["n_facts"], curve["accuracy"])
            found.append((n, float(np.interp(n, curve["n_facts"], curve["numbers"])), more))
        facts, numbers, beyond = map(np.array, zip(*found, strict=True))
        values = dict(facts=np.median(facts), low=facts.min(), high=facts.max(), numbers=np.median(numbers))
        rows.append(
            dict(zip(SHAPE, shape, strict=True)) | values | dict(seeds=len(found), beyond=beyond.sum())
        )
    table = pd.DataFrame(rows)
    if constants is None:
        return table.assign(law=np.nan)
    table = table.merge(constants[["task", "model", "a"]], on=["task", "model"], how="left")
    fitted = table["a"].notna() & table["d_state"].notna()
    table["law"] = np.nan
    of = table[fitted]
    table.loc[fitted, "law"] = facts_at(
        of["d_model"], of["d_state"], of["vocab_size"], of["n_layer"], of["a"], CAPACITY
    )
    return table.drop(columns="a")


def draw_frontier(table: pd.DataFrame) -> Figure:
    """Draw facts recalled against numbers held: a panel for each task, a colour for each family.

    Points are medians of the seeds; their bars reach from the worst to the best. A hollow point recalls all
    facts that were tried in most seeds, so it is a lower bound. Lines are the fitted law, one for each width.

    Args:
        table: Result of `frontier_table`.

    Returns:
        The figure.
    """
    tasks, models = sorted(table["task"].unique()), [m for m in FAMILIES if m in set(table["model"])]
    widths = sorted(table["d_model"].unique())
    figure, axes = panels(1, len(tasks), (4.4, 3.4), sharey=True)
    for ax, task in zip(axes[0], tasks, strict=True):
        for (model, D), part in table[table["task"] == task].groupby(["model", "d_model"]):
            part, color = part.sort_values("numbers"), family_colors()[model]
            look = dict(color=color, marker=MARKERS[widths.index(D) % len(MARKERS)], ms=5, lw=1)
            bars = np.stack([part["facts"] - part["low"], part["high"] - part["facts"]])
            bound = (2 * part["beyond"] > part["seeds"]).to_numpy()
            for hollow in (False, True):
                some = part[bound == hollow]
                face = dict(mfc="white") if hollow else {}
                ax.errorbar(
                    some["numbers"], some["facts"], yerr=bars[:, bound == hollow], ls="", **look, **face
                )
            ax.plot(part["numbers"], part["law"], color=color, lw=1.2, alpha=faintness(D, widths))
        ax.set(xscale="log", yscale="log", title=task, xlabel="numbers held when the context has been read")
        for axis in (ax.xaxis, ax.yaxis):
            plain_log(axis)
    axes[0, 0].set_ylabel(f"facts recalled at {CAPACITY}")
    entries: dict[str, dict[str, Any]] = family_looks(models, ls="", marker="o")
    entries |= {f"D = {D}": dict(color="0.3", ls="", marker=MARKERS[i]) for i, D in enumerate(widths)}
    entries |= {"at least": dict(color="0.3", ls="", marker="o", mfc="white"), "law": dict(color="0.3")}
    legend(figure, entries, width=1.2)
    return figure
