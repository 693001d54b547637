"""Tables of README.md and docs/vlm.md, from the runs of this study:

    python -m studies.vlm_pretrained.summary [RUNS]

With RUNS (what `vlm.train --out` named) it first writes results.parquet beside this file and, of the language
models themselves (vlm/configs/words.py), words.parquet. What stands between the markers `<!-- NAME -->` and
`<!-- /NAME -->` in README.md and docs/vlm.md is made from those tables.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.tables import by_seed, fill, share
from ssm_retrieval.style import NAMES
from ssm_retrieval.tables import markdown
from ssm_retrieval.training import store
from studies.scores import collect, cost
from vlm import pretrained
from vlm.config import read_file
from vlm.results import GUESSES

HERE = Path(__file__).parent
RESULTS, WORDS = HERE / "results.parquet", HERE / "words.parquet"
FAMILIES = ("transformer", "mamba")
# What the quick start is meant to reach, in per cent; CIDEr x 100.
GOALS = {
    ("existence", "accuracy"): 85, ("count", "accuracy"): 70, ("attribute", "accuracy"): 85,
    ("comparison", "accuracy"): 75, ("spatial", "accuracy"): 80, ("grounding", "iou@0.5"): 70,
    ("pointing", "accuracy"): 80, ("reading-digit", "accuracy"): 80, ("reading-word", "accuracy"): 85,
    ("caption", "object_precision"): 70, ("caption", "object_recall"): 70, ("caption", "cider"): 300,
}  # fmt: skip


DOCS = HERE.parents[1] / "docs" / "vlm.md"
PAGES = {HERE / "README.md": ("scores", "cost"), DOCS: ("in words", "quick start")}


def main(runs: Path | None) -> None:
    """Make the tables of the pages anew; first from a folder of runs, if given."""
    if runs is not None:
        collect(read_file(HERE / "runs.py"), runs, RESULTS)
        collect(read_file(pretrained.CONFIG), runs, WORDS)
    for path, text in filled(pd.read_parquet(RESULTS)).items():
        store.write_bytes(path, text.encode())


def filled(results: pd.DataFrame) -> dict[Path, str]:
    """Return the text of every page with its tables made anew."""
    made = {
        "scores": scores(results), "cost": cost(results, FAMILIES),
        "quick start": first_seed(results, FAMILIES),
        "in words": first_seed(pd.read_parquet(WORDS), (*FAMILIES, "hybrid")),
    }  # fmt: skip
    return {
        path: fill(path.read_text(encoding="utf-8"), {name: made[name] for name in names})
        for path, names in PAGES.items()
    }


def scores(results: pd.DataFrame) -> str:
    """Scores by task beside the best guess and the goal, and in how many seeds the goal was reached."""
    rows = []
    for (task, metric), goal in GOALS.items():
        part = results[(results["task"] == task) & (results["metric"] == metric)].sort_values("seed")
        guess = percent(part[list(GUESSES)].astype(float).max(axis=None))
        cells = []
        for family in FAMILIES:
            values = 100 * part.loc[part["family"] == family, "value"].to_numpy()
            cells += [seeds(values), share((values >= goal).sum(), values.size)]
        rows.append([label(task, metric), guess, goal, *cells])
    families = [column for family in FAMILIES for column in (NAMES[family], "at the goal")]
    return markdown(["task", "best guess", "goal", *families], rows)


def first_seed(results: pd.DataFrame, families: Sequence[str]) -> str:
    """Scores of seed 0, which is what a config of the toolkit gives, beside each of the guesses."""
    part: Any = results[results["seed"] == 0].set_index(["task", "metric", "family"]).sort_index()
    rows = []
    for task, metric in GOALS:
        both: Any = part.loc[(task, metric)]
        guesses = [percent(both[name].iloc[0]) for name in GUESSES]
        rows.append([label(task, metric), *guesses, *(percent(both["value"][family]) for family in families)])
    columns = ["task", "chance", "without the image", "ignoring the object"]
    return markdown([*columns, *(NAMES[family] for family in families)], rows)


def percent(value: Any) -> str:
    """A share in per cent; "-" for none."""
    return "-" if value is None or np.isnan(value) else f"{100 * value:.1f}"


def label(task: str, metric: str) -> str:
    """How a row is named."""
    return task if metric in ("accuracy", "iou@0.5") else f"{task}, {metric.replace('_', ' ')}"


def seeds(values: Any) -> str:
    """The mean over seeds, and every seed's value."""
    return f"{values.mean():.1f} ({by_seed(values, 1)})"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
