"""Tables and figures of README.md, from measured.csv.

    python -m studies.capacity.report

`measure.py` makes measured.csv. A run that hardly recalls the fewest facts has not learned the task, and says
nothing about the room in a state: tables say how many seeds learned, and fits and figures leave the others
out.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.capacity_law import CONSTANTS, facts_at, fit_constants, recall_probability
from analysis.plots.recall_law import collapse_table, draw_collapse, draw_frontier, frontier_table, recalled
from analysis.tables import fill, share
from ssm_retrieval import models
from ssm_retrieval.cli import guarded
from ssm_retrieval.style import FAMILIES, NAMES, save, theme
from ssm_retrieval.tables import markdown
from ssm_retrieval.training import store
from studies.capacity import config

HERE = Path(__file__).parent
MEASURED = HERE / "measured.csv"
LAW = ("linear", "mamba", "mamba2")  # families whose state is what the law speaks of
BESIDE = ("mamba", "mamba2", *config.KEYED)  # families of `keyed_table`
PUBLISHED = {"position": "ar", "mqar": "mqar"}  # how the law's authors call a task: one question, or all
# The paper's Mambas: `shaking up VLMs` (arXiv 2409.05395) starts from state-spaces/mamba-*
SIZES = ("mamba-790m", "mamba-1.4b", "mamba-2.8b")
PATCHES = (576, 640)  # of a picture at 336 pixels; and with 64 tokens of text that are facts, too
VOCAB = 50_280


def main() -> int:
    """Make all tables and figures anew; returns the exit status."""
    import matplotlib

    matplotlib.use("Agg")
    measured = pd.read_csv(MEASURED)
    good = learned(measured)
    fits = fit_constants(good[good["model"].isin(LAW)], by=("task", "model"))
    text = (HERE / "README.md").read_text(encoding="utf-8")
    store.write_bytes(HERE / "README.md", filled(text, measured).encode())
    with theme():
        for task, rows in good[good["model"].isin(LAW)].groupby("task"):
            save(draw_collapse(collapse_table(rows)), HERE / f"collapse-{task}")
        keyed = good[good["model"].isin(config.KEYED)]
        if len(keyed):
            save(draw_collapse(collapse_table(keyed)), HERE / "collapse-keys")
        save(draw_frontier(frontier_table(good, fits)), HERE / "frontier")
    return 0


def learned(measured: pd.DataFrame) -> pd.DataFrame:
    """Rows of the runs whose accuracy at the fewest facts is at least halfway from chance to 1."""
    first = measured.sort_values("n_facts").groupby("run")[["correct", "count", "chance"]].first()
    good = first.index[first["correct"] >= (1 + first["chance"]) / 2 * first["count"]]
    return measured[measured["run"].isin(good)]


def filled(text: str, measured: pd.DataFrame) -> str:
    """README with its tables made anew."""
    good = learned(measured)
    law = good[good["model"].isin(LAW)]
    tables = {
        "runs": f"{runs_table(measured)}\n\n{not_run(measured)}".rstrip(),
        "frontier": frontier_figure(good),
        "keyed": keyed_table(measured),
        "fits": fits_table(law),
        "collapse": collapse_figures(law),
        "cells": cells_table(law),
        "prediction": prediction(fit_constants(law, by=("task", "model"))),
    }
    return fill(text, tables)


def runs_table(measured: pd.DataFrame) -> str:
    """Markdown: what was trained, how many seeds learned it, and how many facts each of these recalls."""
    good, rows = learned(measured), []
    for (task, name, layers, D), of_width in measured.groupby(["task", "model", "n_layer", "d_model"]):
        for _, cell in of_width.groupby("d_state", dropna=False):
            curves = _curves(cell[cell["run"].isin(good["run"])])
            facts = [recalled(c["n_facts"], c["correct"] / c["count"]) for c in curves]
            words = ", ".join(f"{'≥ ' if beyond else ''}{n:.0f}" for n, beyond in facts)
            rows.append([
                task, NAMES[str(name)], str(layers), str(D), _whole(cell["d_state"].iloc[0]),
                share(len(facts), cell["run"].nunique()), words or "–",
                f"{cell.groupby('run')['seconds'].first().median():.0f}",
            ])  # fmt: skip
    header = ["task", "model", "layers", "D", "N", "seeds that learned", "facts at 0.95, by seed", "seconds"]
    return markdown(header, rows)


def _whole(states: float) -> str:
    """d_state of a model; a dash if it has none, which the table says with nan."""
    return "–" if np.isnan(states) else f"{states:.0f}"


def _curves(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of each run by number of facts, runs by seed."""
    return [curve for _, curve in rows.sort_values(["seed", "n_facts"]).groupby(["seed", "run"])]


def not_run(measured: pd.DataFrame) -> str:
    """A line that names the families without a finished run, by task; empty if all have one."""
    planned = {("mqar", "linear"), ("mqar", "mamba")}  # recipes
    planned |= {(run.task, run.model[0]) for run in (*config.position(0), *config.mqar(0))}
    done = set(measured[["task", "model"]].itertuples(index=False, name=None))
    words = [
        f"{task}: {', '.join(NAMES[name] for name in FAMILIES if (task, name) in planned - done)}"
        for task in sorted({task for task, _ in planned - done}, reverse=True)
    ]
    return f"Not run yet: {'; '.join(words)}." if words else ""


def frontier_figure(good: pd.DataFrame) -> str:
    """Markdown: the figure, with the families that it has."""
    names = ", ".join(NAMES[name] for name in FAMILIES if name in set(good["model"]))
    return f"![Facts recalled against numbers held: {names}](frontier.png)" if names else "Not run yet."


def keyed_table(measured: pd.DataFrame) -> str:
    """Markdown: `keyed_facts`, the fits of the law, and the figure; a line if no such layer has run.

    Args:
        measured: All rows.

    Returns:
        The text.
    """
    rows = measured[(measured["task"] == "position") & measured["model"].isin(config.KEYED)]
    if not len(rows):
        return "Not run yet."
    figure = "![Accuracy against facts / (layers N D), layers with keys](collapse-keys.png)"
    return "\n\n".join([keyed_facts(measured), fits_table(learned(rows)), figure])


def keyed_facts(measured: pd.DataFrame) -> str:
    """Markdown: facts at 0.95 of layers with keys, beside Mamba's, by width and state size.

    Args:
        measured: All rows; those of runs that have not learned the task count as 0 facts.

    Returns:
        The table.
    """
    rows = measured[(measured["task"] == "position") & measured["model"].isin(BESIDE)]
    good, lines = set(learned(rows)["run"]), []
    shapes = config.SHAPES[:4]
    for D, N in sorted(shapes):
        cells = [str(D), str(N)]
        for model in BESIDE:
            mine = rows[(rows["model"] == model) & (rows["d_model"] == D) & (rows["d_state"] == N)]
            facts = []
            for curve in _curves(mine):
                n, beyond = recalled(curve["n_facts"], curve["correct"] / curve["count"])
                facts.append((n if curve["run"].iloc[0] in good else 0.0, beyond))
            facts.sort()
            words = [f"{'≥ ' if beyond else ''}{n:.0f}" for n, beyond in facts]
            middle = words[len(words) // 2] if words else "–"
            cells.append(f"{middle} [{words[0]}, {words[-1]}]" if words else "not run")
        lines.append(cells)
    return markdown(["D", "N", *(NAMES[model] for model in BESIDE)], lines)


def fits_table(law: pd.DataFrame) -> str:
    """Markdown: the law's constant of each task and family, beside the published one."""
    rows = []
    for fit in fit_constants(law, by=("task", "model")).itertuples():
        known = CONSTANTS.get((str(fit.model), PUBLISHED[str(fit.task)]))
        rows.append([
            fit.task, NAMES[str(fit.model)], "–" if known is None else f"{known:.3g}", interval(fit),
            f"{fit.lapse:.3f}", str(fit.seeds), f"{fit.rmse:.3f}", f"{fit.worst:+.3f}",
        ])  # fmt: skip
    header = ["task", "model", "published a", "a [95 %]", "lapses", "seeds", "rms misfit", "worst misfit"]
    return markdown(header, rows)


def collapse_figures(law: pd.DataFrame) -> str:
    """Markdown: the figure of each task that has runs."""
    return "\n\n".join(
        f"![Accuracy against facts / (layers N D), {task}](collapse-{task}.png)"
        for task in sorted(law["task"].unique())
    )


def cells_table(law: pd.DataFrame) -> str:
    """Markdown: the constant of every width and state size by itself. If curves collapse, all are equal."""
    fits = fit_constants(law, by=("task", "model", "d_model", "d_state"))
    states = sorted(fits["d_state"].unique())
    rows = []
    for (task, model, D), part in fits.groupby(["task", "model", "d_model"]):
        own = {fit.d_state: interval(fit) for fit in part.itertuples()}
        rows.append([task, NAMES[str(model)], str(D), *(own.get(N, "–") for N in states)])
    return markdown(["task", "model", "D", *(f"N = {N:.0f}" for N in states)], rows)


def interval(fit: object) -> str:
    """A fitted constant with its interval, if there is one."""
    a, low, high = (getattr(fit, name) for name in ("a", "low", "high"))
    return f"{a:.2f}" if np.isnan(low) else f"{a:.2f} [{low:.2f}, {high:.2f}]"


def prediction(fits: pd.DataFrame) -> str:
    """Markdown: `prediction_table`, and whose constants it has.

    Args:
        fits: As for `prediction_table`.

    Returns:
        The table and a sentence or two.
    """
    shapes = [models.config(size) for size in SIZES]
    held = [float(facts_at(s.d_model, s.d_state, VOCAB, 1, CONSTANTS["linear", "ar"])) for s in shapes]
    words = (
        f"With the published constants, one layer holds {min(held):,.0f} facts or more at 0.95, and a "
        f"picture has {PATCHES[0]} patches. The constants are of small models that were trained for recall. "
        "Whether they hold for pretrained ones is not measured here."
    )
    if not len(of_mamba(fits)):
        words += " This study has not fitted a constant of its own to Mamba on the position task yet."
    return f"{prediction_table(fits)}\n\n{words}"


def of_mamba(fits: pd.DataFrame) -> pd.DataFrame:
    """The fit that speaks of the paper's models and task."""
    return fits[(fits["model"] == "mamba") & (fits["task"] == "position")]


def prediction_table(fits: pd.DataFrame) -> str:
    """Markdown: what the law says of the paper's Mambas, by constant, with one of their layers or all.

    Args:
        fits: Result of `fit_constants` by task and model.

    Returns:
        The table.
    """
    constants = {
        "published, trained Mamba": CONSTANTS["mamba", "ar"],
        "published, linear": CONSTANTS["linear", "ar"],
    }
    ours = of_mamba(fits)
    for name in ("a", "low", "high") if len(ours) else ():
        words = {"a": "here", "low": "here, lower end", "high": "here, upper end"}[name]
        constants[f"fitted {words}"] = float(ours[name].iloc[0])
    rows = []
    for size, (words, a) in itertools.product(SIZES, constants.items()):
        shape = models.config(size)
        D, N, layers = shape.d_model, shape.d_state, shape.n_layer
        held = [float(facts_at(D, N, VOCAB, used, a)) for used in (1, layers)]
        recall = [recall_probability(n, D, N, VOCAB, used, a) for used in (1, layers) for n in PATCHES]
        rows.append([
            size, f"{layers} × {N} × {D}", f"{a:.2f} ({words})", *(f"{n:,.0f}" for n in held),
            *(f"{p:.3f}" for p in recall),
        ])  # fmt: skip
    header = ["model", "layers × N × D", "a", "facts at 0.95, one layer", "all layers"]
    header += [f"recall of {n}, {used}" for used in ("one layer", "all") for n in PATCHES]
    return markdown(header, rows)


if __name__ == "__main__":
    sys.exit(guarded(main))
