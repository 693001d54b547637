"""The tables of README.md: the published numbers of every recipe, and ours beside them.

    python -m studies.recipes.report                          # from the committed CSV files
    python -m studies.recipes.report runs/recall_law_linear   # after that sweep: its CSV file, too

NAME.csv beside NAME.py has one row per finished run. A cell without runs has a dash.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

import analysis
from analysis.tables import between, by_seed, fill
from ssm_retrieval.cli import guarded
from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics import mean_interval
from ssm_retrieval.tables import markdown
from ssm_retrieval.training import store

HERE = Path(__file__).parent
RECIPES = ("recall_law_linear",)
COLUMNS = ["d_model", "d_state", "seed", "accuracy", "correct", "count", "seconds", "commit"]
HEADER = [
    "width D",
    "states N",
    "published",
    "ours, mean [95 %]",
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
        store.write_bytes(HERE / f"{name}.csv", finished(analysis.load(runs)).to_csv(index=False).encode())
    text = (HERE / "README.md").read_text(encoding="utf-8")
    store.write_bytes(HERE / "README.md", filled(text).encode())
    return 0


def finished(results: pd.DataFrame) -> pd.DataFrame:
    """The last, held-out evaluation of every run: `COLUMNS`, sorted by cell and seed."""
    final = results[(results["kind"] == "final") & (results["purpose"] == "report")]
    return final[COLUMNS].sort_values(COLUMNS[:3]).reset_index(drop=True)


def filled(text: str) -> str:
    """README with its tables made anew."""
    tables = {}
    for name in RECIPES:
        published = importlib.import_module(f"studies.recipes.{name}").PUBLISHED
        file = HERE / f"{name}.csv"
        tables[name] = cells(published, pd.read_csv(file) if file.exists() else pd.DataFrame(columns=COLUMNS))
    return fill(text, tables)


def cells(published: Mapping[tuple[int, int], float], runs: pd.DataFrame) -> str:
    """Markdown, a line per published cell.

    Args:
        published: (d_model, d_state) to accuracy.
        runs: Columns as in `COLUMNS`.

    Returns:
        The table.
    """
    rows = []
    for (d_model, d_state), wanted in published.items():
        cell = runs[(runs["d_model"] == d_model) & (runs["d_state"] == d_state)].sort_values("seed")
        ours = ["–"] * 4
        if len(cell):
            mean, low, high = mean_interval(cell["accuracy"], bounds=(0, 1))
            ours = [between(mean, low, high) if len(cell) > 1 else f"{mean:.3f}", by_seed(cell["accuracy"])]
            ours += [f"{mean - wanted:+.3f}", f"{cell['seconds'].median():.0f}"]
        rows.append([str(d_model), str(d_state), f"{wanted:.2f}", *ours])
    return markdown(HEADER, rows)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(*sys.argv[1:2])))
