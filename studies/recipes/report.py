"""The tables of README.md: the published numbers of every recipe, and ours beside them.

    python -m studies.recipes.report                          # from the committed CSV files
    python -m studies.recipes.report runs/recall_law_linear   # after that sweep: its CSV file, too

NAME.csv beside NAME.py has one row per finished run. A cell without runs says so, and one without a published
number has a dash. A recipe says in `CELL` which columns of the results store tell its cells apart, and in
`PUBLISHED` which accuracy each cell should have.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import analysis
from analysis.tables import between, by_seed, fill
from ssm_retrieval.cli import guarded
from ssm_retrieval.errors import UserError
from ssm_retrieval.style import NAMES
from ssm_retrieval.tables import markdown
from ssm_retrieval.training import store

HERE = Path(__file__).parent
RECIPES = (
    "recall_law_linear",
    "recall_law_mamba",
    "recall_law_mamba_long",
    "zoology_figure2",
    "mamba_induction",
    "mamba_selective_copy",
    "mad_recall",
    "repeat_after_me",
)
COLUMNS = ["seed", "accuracy", "correct", "count", "seconds", "commit"]
WORDS = {"model": "model", "d_model": "width D", "d_state": "states N", "seq_len": "context"}
HEADER = [
    "published, or goal",
    "ours, mean [lowest, highest seed]",
    "by seed",
    "ours - published",
    "median seconds",
]


def main(runs: str | None = None) -> int:
    """Make the tables anew, from a sweep's folder of runs if one is given; returns the exit status.

    Raises:
        UserError: If the folder has the name of no recipe.
    """
    if runs is not None:
        name = Path(runs).resolve().name
        if name not in RECIPES:
            raise UserError(f"RUNS {runs} is of no recipe; its name must be one of {', '.join(RECIPES)}")
        found = finished(analysis.load(runs), recipe(name).CELL)
        store.write_bytes(HERE / f"{name}.csv", found.to_csv(index=False).encode())
    text = (HERE / "README.md").read_text(encoding="utf-8")
    store.write_bytes(HERE / "README.md", filled(text).encode())
    return 0


def recipe(name: str) -> Any:
    """The module of a recipe."""
    return importlib.import_module(f"studies.recipes.{name}")


def finished(results: pd.DataFrame, cell: Sequence[str]) -> pd.DataFrame:
    """The last, held-out evaluation of every run: columns `cell` and `COLUMNS`, sorted by cell and seed."""
    final = results[(results["kind"] == "final") & (results["purpose"] == "report")]
    return final[[*cell, *COLUMNS]].sort_values([*cell, "seed"]).reset_index(drop=True)


def filled(text: str) -> str:
    """README with its tables made anew."""
    tables = {}
    for name in RECIPES:
        file, cell = HERE / f"{name}.csv", recipe(name).CELL
        runs = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=[*cell, *COLUMNS])
        tables[name] = cells(recipe(name).PUBLISHED, runs, cell)
    return fill(text, tables)


def cells(
    published: Mapping[tuple[Any, ...], float | str | None], runs: pd.DataFrame, cell: Sequence[str]
) -> str:
    """Markdown, a line per published cell.

    Args:
        published: Values of the columns `cell` to accuracy; words where the paper has no number for it; None
            if nothing is at hand.
        runs: The columns `cell` and `COLUMNS`.
        cell: Columns that tell cells apart, keys of `WORDS`.

    Returns:
        The table.
    """
    rows = []
    for values, wanted in published.items():
        same = runs[list(cell)] == pd.Series(dict(zip(cell, values, strict=True)))
        mine = runs[same.all(axis=1)].sort_values("seed")
        ours = ["not run yet", "–", "–", "–"]
        if len(mine):
            accuracy = mine["accuracy"]
            mean, low, high = accuracy.mean(), accuracy.min(), accuracy.max()
            ours = [between(mean, low, high) if len(mine) > 1 else f"{mean:.3f}", by_seed(accuracy)]
            ours += [
                f"{round(mean - wanted, 3) + 0:+.3f}" if isinstance(wanted, float) else "–",  # no -0.000
                f"{mine['seconds'].median():.0f}",
            ]
        names = [
            NAMES[value] if name == "model" else str(value) for name, value in zip(cell, values, strict=True)
        ]
        rows.append([*names, f"{wanted:.2f}" if isinstance(wanted, float) else wanted or "–", *ours])
    return markdown([*(WORDS[name] for name in cell), *HEADER], rows)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(*sys.argv[1:2])))
