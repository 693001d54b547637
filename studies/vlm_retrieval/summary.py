"""Tables and figures of README.md, from the runs of this study:

    python -m studies.vlm_retrieval.summary [RUNS]

With RUNS (what `vlm.train --out` named) it first writes results.parquet beside this file. Cells are named
as in runs.py. Differences are paired by seed: the same pictures in the same order. An interval in square
brackets is Student's over seeds at 95 %; in the tables of differences it holds for all COMPARISONS at once
(Bonferroni).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.tables import between, fill, share
from analysis.vlm_plots import main_rows
from ssm_retrieval.statistics import mean_interval
from ssm_retrieval.style import NAMES, save, theme
from ssm_retrieval.tables import markdown
from ssm_retrieval.training import store
from studies.scores import collect
from studies.vlm_retrieval.runs import CELLS, EVALUATION, OTHERS, PAPER, SEEDS
from vlm.config import read_file
from vlm.results import GUESSES

HERE = Path(__file__).parent
RESULTS = HERE / "results.parquet"
FAMILIES = (*PAPER, *OTHERS)
LAYOUTS = ("query-first", "instruction-first", "two-pass")
BY_PATCHES = {9: "base", 16: "16 patches", 36: "36 patches"}
BY_SHAPES = {2: "grounding-2shapes", 4: "grounding-4shapes", 6: "grounding"}
TASKS = tuple(EVALUATION)
# What the page asks, all of it decided before the runs: families in every cell and task; layouts against the
# base, in every task; and resolution (36 against 16 patches), in every task.
COMPARISONS = (len(CELLS) + 2 * len(LAYOUTS) + 2) * len(TASKS)


def main(runs: Path | None) -> None:
    """Make the figures and the tables of README.md anew; first from a folder of runs, if given."""
    if runs is not None:
        collect(read_file(HERE / "runs.py"), runs, RESULTS)
    found = scores(pd.read_parquet(RESULTS))
    import matplotlib

    matplotlib.use("Agg")
    from studies.vlm_retrieval import figures

    with theme():
        save(figures.held(found), HERE / "held")
        save(figures.layouts(found), HERE / "layouts")
    path = HERE / "README.md"
    store.write_bytes(path, filled(path.read_text(encoding="utf-8")).encode())


def filled(text: str) -> str:
    """README with its tables made anew."""
    results = pd.read_parquet(RESULTS)
    found = scores(results)
    return fill(
        text,
        {
            "base": base(found),
            "families": families(found),
            "shapes": shapes(found),
            "patches": patches(found),
            "layouts": layouts(found),
            "resolution": resolution(found),
            "cost": cost(results),
        },
    )


def scores(results: pd.DataFrame) -> pd.DataFrame:
    """Return right answers in points: cell, family, seed, task, value, guess (the best of GUESSES).

    Args:
        results: Columns `vlm.results.COLUMNS`.

    Returns:
        One row per run and task.
    """
    rows = main_rows(results).copy()
    name: Any = rows["run"].str
    rows["cell"] = name.extract(r"^(?:" + "|".join(FAMILIES) + r")-(.+)-seed\d+$", expand=False).map(
        {cell.name.replace(" ", "-"): cell.name for cell in CELLS}
    )
    rows["value"] = 100 * rows["value"]
    rows["guess"] = 100 * rows[list(GUESSES)].astype(float).max(axis=1)
    return rows[["cell", "family", "seed", "task", "value", "guess"]]


def of(found: pd.DataFrame, cell: str, family: str, task: str) -> pd.Series:
    """Return the values of a cell, family and task by seed; empty if there are none."""
    mine = found[(found["cell"] == cell) & (found["family"] == family) & (found["task"] == task)]
    return mine.set_index("seed")["value"].sort_index()


def difference(a: pd.Series, b: pd.Series) -> str:
    """Return the mean of a - b, paired by seed, with an interval that holds for all COMPARISONS at once."""
    values = (a - b).dropna().to_numpy()
    if values.size < 2:
        return "–"
    mean, low, high = mean_interval(values, 1 - 0.05 / COMPARISONS)
    return between(mean, low, high, 1)


def level(values: pd.Series) -> str:
    """Return the mean over seeds with its 95 % interval."""
    return "–" if values.size < 2 else between(*mean_interval(values.to_numpy()), 1)


def base(found: pd.DataFrame) -> str:
    """Every task in the base cell: levels, and in how many seeds a model is above the best guess."""
    lines = []
    for task in TASKS:
        guess = found.loc[found["task"] == task, "guess"].max()
        cells = []
        for family in FAMILIES:
            values = of(found, "base", family, task)
            cells.append(
                f"{level(values)}; {share((values > guess).sum(), values.size)}" if values.size else "–"
            )
        lines.append([task, f"{guess:.1f}", *cells])
    return markdown(["task", "best guess", *(NAMES[family] for family in FAMILIES)], lines)


def families(found: pd.DataFrame) -> str:
    """Mamba minus Transformer: cells across, tasks down."""
    names = [cell.name for cell in CELLS]
    lines = [
        [
            task,
            *(
                difference(of(found, name, "mamba", task), of(found, name, "transformer", task))
                for name in names
            ),
        ]
        for task in TASKS
    ]
    return markdown(["task", *names], lines)


def shapes(found: pd.DataFrame) -> str:
    """Grounding by the number of shapes in a scene, in the base cell."""
    lines = []
    for number, task in BY_SHAPES.items():
        guess = found.loc[found["task"] == task, "guess"].max()
        values = {family: of(found, "base", family, task) for family in FAMILIES}
        gap = difference(values["transformer"], values["mamba"])
        lines.append([number, f"{guess:.1f}", *(level(values[family]) for family in FAMILIES), gap])
    head = ["shapes", "best guess", *(NAMES[family] for family in FAMILIES), "Transformer − Mamba"]
    return markdown(head, lines)


def patches(found: pd.DataFrame) -> str:
    """Grounding among six shapes by the number of patches."""
    lines = []
    for number, cell in BY_PATCHES.items():
        values = {family: of(found, cell, family, "grounding") for family in FAMILIES}
        gap = difference(values["transformer"], values["mamba"])
        lines.append([number, *(level(values[family]) for family in FAMILIES), gap])
    return markdown(["patches", *(NAMES[family] for family in FAMILIES), "Transformer − Mamba"], lines)


def layouts(found: pd.DataFrame) -> str:
    """What a layout adds to the base cell: layouts and families across, tasks down."""
    pairs = [(layout, family) for layout in LAYOUTS for family in PAPER]
    pairs += [("query-first", family) for family in OTHERS]
    lines = [
        [task, *(difference(of(found, cell, f, task), of(found, "base", f, task)) for cell, f in pairs)]
        for task in TASKS
    ]
    return markdown(["task", *(f"{NAMES[family]}, {cell}" for cell, family in pairs)], lines)


def resolution(found: pd.DataFrame) -> str:
    """96 pixels minus 64 pixels, both in patches of 16: 36 patches against 16."""
    lines = [
        [
            task,
            *(difference(of(found, "36 patches", f, task), of(found, "16 patches", f, task)) for f in PAPER),
        ]
        for task in TASKS
    ]
    return markdown(["task", *(NAMES[family] for family in PAPER)], lines)


def cost(results: pd.DataFrame) -> str:
    """Weights and seconds of the models by family."""
    rows = []
    for family in FAMILIES:
        mine = results[results["family"] == family]
        if mine.empty:
            continue
        seconds = mine.drop_duplicates("run")["seconds"]
        weights = f"{mine['parameters'].iloc[0]:,}"
        rows.append([NAMES[family], weights, len(seconds), f"{seconds.min():.0f} to {seconds.max():.0f}"])
    return markdown(["model", "weights", "runs", "seconds of a run"], rows)


def complete(found: pd.DataFrame) -> bool:
    """Whether every cell, family, seed and task is there once."""
    wanted = len(SEEDS) * len(TASKS) * sum(len(cell.families) for cell in CELLS)
    return len(found) == wanted and not found.duplicated(["cell", "family", "seed", "task"]).any()


if __name__ == "__main__":
    np.seterr(all="raise")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
