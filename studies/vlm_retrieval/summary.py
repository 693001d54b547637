"""Tables and figures of README.md, from the runs of this study:

    python -m studies.vlm_retrieval.summary [RUNS]

With RUNS (what `vlm.train --out` named) it first writes results.parquet beside this file, of the runs that
are evaluated so far. Cells are named as in runs.py. Differences are paired by seed: the same pictures in the
same order. An interval in square brackets is Student's over seeds at 95 %; in the tables of differences it
holds for all COMPARISONS at once (Bonferroni).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.capacity_law import recall_probability
from analysis.tables import between, fill, share
from analysis.vlm_plots import main_rows
from ssm_retrieval import models
from ssm_retrieval.statistics import geometric_mean_interval, mean_interval
from ssm_retrieval.statistics.seeds import APART
from ssm_retrieval.style import NAMES, save, theme
from ssm_retrieval.tables import markdown
from ssm_retrieval.training import store
from studies.scores import collect, cost
from studies.vlm_retrieval.runs import CELLS, EVALUATION, OTHERS, PAPER, SEEDS
from vlm.config import read_file
from vlm.configs.words import MODELS
from vlm.results import GUESSES, table_path

HERE = Path(__file__).parent
RESULTS = HERE / "results.parquet"
FAMILIES = (*PAPER, *OTHERS)
FIRST = "image-first"  # the cell that the other layouts are compared with
LAYOUTS = ("instruction-first", "query-first", "two-pass")
BY_PATCHES = {9: "base", 16: "16 patches", 36: "36 patches"}
BY_SHAPES = {2: "grounding-2shapes", 4: "grounding-4shapes", 6: "grounding"}
TASKS = tuple(EVALUATION)
FACTS = 8  # of an object: colour, name, size, texture and four corners
VOCABULARY = 300  # tokens of the tokenizer, rounded up
WORST = 2.13  # the constant of Mamba on mqar in studies/capacity, far above the published one
# What the page asks in every task: families in every cell; of both families layouts against the image first,
# and resolution (36 against 16 patches), and whether families differ in that. Of grounding: does the gap grow
# with shapes (4 and 6 against 2), and with patches (16 and 36 against 9)?
COMPARISONS = (len(CELLS) + len(PAPER) * (len(LAYOUTS) + 1) + 1) * len(TASKS) + 4


def main(runs: Path | None) -> None:
    """Make the figures and the tables of README.md anew; first from a folder of runs, if given."""
    if runs is not None:
        done = [run for run in read_file(HERE / "runs.py") if table_path(runs, run.name).exists()]
        collect(done, runs, RESULTS)
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
    """README with its tables made anew; those of cells that have not run yet have no place in it."""
    results = pd.read_parquet(RESULTS)
    found = scores(results)
    tables = {
        "base": base(found),
        "families": families(found),
        "shapes": shapes(found),
        "patches": patches(found),
        "layouts": layouts(found),
        "resolution": resolution(found),
        "cost": cost(results, FAMILIES),
        "state": state(found),
        "orders": orders(pd.read_csv(HERE / "orders.csv")),
        "changed": changed(pd.read_csv(HERE / "changed.csv")),
        "edges": edges(pd.read_csv(HERE / "changed.csv")),
        "places": places(pd.read_csv(HERE / "places.csv")),
        "looks": looks(pd.read_csv(HERE / "looks.csv")),
    }
    return fill(text, {name: made for name, made in tables.items() if f"<!-- {name} -->" in text})


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


def gap(found: pd.DataFrame, cell: str, task: str) -> pd.Series:
    """Return Transformer minus Mamba in points by seed."""
    return of(found, cell, "transformer", task) - of(found, cell, "mamba", task)


def difference(a: pd.Series, b: pd.Series | float = 0.0) -> str:
    """Return the mean of a - b, paired by seed, with an interval that holds for all COMPARISONS at once."""
    return _mean((a - b).dropna().to_numpy(), 1 - 0.05 / COMPARISONS)


def level(values: pd.Series) -> str:
    """Return the mean over seeds with its 95 % interval, or with the range of two groups of seeds."""
    return _mean(values.to_numpy(), 0.95)


def _mean(values: npt.NDArray[np.float64], confidence: float) -> str:
    """A mean of points by seed with Student's interval; with the range if neighbours are APART."""
    if values.size < 2:
        return "–"
    if np.diff(np.sort(values)).max() > 100 * APART:
        return f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})"
    return between(*mean_interval(values, confidence), 1)


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
    names = [cell.name for cell in CELLS if (found["cell"] == cell.name).any()]
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


def law(shapes: int) -> float:
    """What the capacity law lets a state of Mamba's size recall, in per cent.

    Args:
        shapes: Shapes of a scene, beside a digit and a word; each has FACTS.

    Returns:
        The probability that a fact is recalled, with the largest constant that studies/capacity has found.
    """
    config: Any = models.config("mamba-tiny", **MODELS["mamba-tiny"])
    facts = FACTS * (shapes + 2)
    recalled = recall_probability(
        facts, config.d_model, config.d_state, VOCABULARY, n_layer=config.n_layer, a=WORST
    )
    return 100 * float(recalled)


def shapes(found: pd.DataFrame) -> str:
    """Grounding by the number of shapes in a scene, in the base cell, beside the capacity law."""
    lines, gaps = [], []
    for number, task in BY_SHAPES.items():
        guess = found.loc[found["task"] == task, "guess"].max()
        values = {family: of(found, "base", family, task) for family in FAMILIES}
        every = (level(values[family]) for family in FAMILIES)
        gaps.append(gap(found, "base", task))
        grown = difference(gaps[-1], gaps[0]) if len(gaps) > 1 else "–"
        lines.append([number, f"{guess:.1f}", *every, difference(gaps[-1]), grown, f"{law(number):.2f}"])
    head = ["shapes", "best guess", *(NAMES[family] for family in FAMILIES), "Transformer − Mamba"]
    return markdown([*head, "more than among two", "a state of Mamba's size could recall"], lines)


def patches(found: pd.DataFrame) -> str:
    """Grounding among six shapes by the number of patches."""
    lines, gaps = [], []
    for number, cell in BY_PATCHES.items():
        if not (found["cell"] == cell).any():
            continue
        every = (level(of(found, cell, family, "grounding")) for family in FAMILIES)
        gaps.append(gap(found, cell, "grounding"))
        grown = difference(gaps[-1], gaps[0]) if len(gaps) > 1 else "–"
        lines.append([number, *every, difference(gaps[-1]), grown])
    head = ["patches", *(NAMES[family] for family in FAMILIES), "Transformer − Mamba"]
    return markdown([*head, "more than with the first"], lines)


def layouts(found: pd.DataFrame) -> str:
    """What a layout adds to the image first: layouts and families across, tasks down."""
    known = set(found["cell"])
    pairs = [(layout, family) for layout in LAYOUTS if layout in known for family in PAPER]
    lines = [
        [task, *(difference(of(found, cell, f, task), of(found, FIRST, f, task)) for cell, f in pairs)]
        for task in TASKS
    ]
    return markdown(["task", *(f"{NAMES[family]}, {cell}" for cell, family in pairs)], lines)


def resolution(found: pd.DataFrame) -> str:
    """96 pixels minus 64 pixels, both in patches of 16: 36 patches against 16."""
    low, high = "16 patches", "36 patches"
    lines = []
    for task in TASKS:
        gained = [difference(of(found, high, family, task), of(found, low, family, task)) for family in PAPER]
        lines.append([task, *gained, difference(gap(found, high, task), gap(found, low, task))])
    return markdown(["task", *(NAMES[family] for family in PAPER), "Transformer − Mamba"], lines)


# --- the probes ---------------------------------------------------------------------------------------------


def _cells(table: pd.DataFrame) -> list[tuple[str, str]]:
    """(family, cell) of a table of probes, in the order of the page."""
    order = [cell.name for cell in CELLS]
    found = set(zip(table["family"], table["cell"], strict=True))
    return sorted(found, key=lambda pair: (order.index(pair[1]), FAMILIES.index(pair[0])))


def changed(table: pd.DataFrame) -> str:
    """Boxes answered after each change of the patches: the target's and, if exchanged, the other object's."""
    lines = []
    for family, cell in _cells(table):
        part = table[(table["family"] == family) & (table["cell"] == cell)]
        row = [NAMES[family], cell]
        for how in ("intact", "other empty", "target empty", "exchanged"):
            row.append(level(100 * part.loc[part["change"] == how, "target"]))
        lines.append([*row, level(100 * part.loc[part["change"] == "exchanged", "other"])])
    head = ["intact", "another object's patch empty", "its own patch empty", "the two exchanged"]
    return markdown(["model", "cell", *head, "exchanged: the other object's box"], lines)


def edges(table: pd.DataFrame) -> str:
    """After the exchange: does an edge of the answer follow what the patch shows, or where it stands?"""
    rows = table[table["change"] == "exchanged"]
    lines = []
    for family, cell in _cells(table):
        part = rows[(rows["family"] == family) & (rows["cell"] == cell)]
        values = [level(100 * part[name]) for name in ("target_x", "other_x", "target_y", "other_y")]
        lines.append([NAMES[family], cell, *values])
    head = ["left edge by content", "left edge by place", "top edge by content", "top edge by place"]
    return markdown(["model", "cell", *head], lines)


def places(table: pd.DataFrame) -> str:
    """Right boxes by the place of the object, of three rows and columns in the order of reading."""
    lines = []
    for family, cell in _cells(table):
        part = table[(table["family"] == family) & (table["cell"] == cell)]
        means = [100 * part.loc[part["place"] == place, "right"].mean() for place in range(9)]
        lines.append([NAMES[family], cell, *(f"{mean:.0f}" for mean in means)])
    return markdown(["model", "cell", *(f"row {i // 3 + 1}, {i % 3 + 1}" for i in range(9))], lines)


def looks(table: pd.DataFrame) -> str:
    """Patches of the object asked for over those of others, by layer: read at the answer, and written."""
    lines = []
    for family, cell in _cells(table):
        part = table[(table["family"] == family) & (table["cell"] == cell)]
        for quantity, at, word in (("attention", "answer", "read"), ("write", "patch", "written")):
            mine = part[(part["quantity"] == quantity) & (part["at"] == at)]
            said = []
            for layer in sorted(set(mine["layer"])):
                values = mine.loc[mine["layer"] == layer, "ratio"]
                said.append(f"{layer}: {between(*geometric_mean_interval(values), 2)}")
            if said:
                lines.append([NAMES[family], cell, word, "; ".join(said)])
    return markdown(["model", "cell", "", "by layer"], lines)


def orders(table: pd.DataFrame) -> str:
    """What the language models know of scenes in words: layouts across, in per cent."""
    lines = []
    for (family, init, task), part in table.groupby(["family", "init", "task"], sort=False):
        right = part["right"]
        shares = [f"{100 * share:.1f}" for share in right]
        lines.append([NAMES[str(family)], init, task, *shares])
    return markdown(["model", "begins with", "task", *table["layout"].unique()], lines)


def state(found: pd.DataFrame) -> str:
    """How many of the planned runs there are."""
    planned = len(SEEDS) * sum(len(cell.families) for cell in CELLS)
    done = len(found.drop_duplicates(["cell", "family", "seed"]))
    return f"{done} of {planned} runs are done."


if __name__ == "__main__":
    np.seterr(all="raise")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
