"""The tables of README.md, from the runs of this study:

    python -m studies.curricula.report [RUNS]

Writes results.parquet, by_length.csv and learning_rates.json beside this file if RUNS is given, and replaces
what stands between the markers `<!-- NAME -->` and `<!-- /NAME -->` in README.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

import analysis
from analysis.tables import by_seed, cost, fill, share
from ssm_retrieval.cli import guarded
from ssm_retrieval.style import NAMES
from ssm_retrieval.tables import markdown
from ssm_retrieval.training import store
from ssm_retrieval.training.outcomes import examples_to_threshold
from ssm_retrieval.training.parquet import rows_of, to_parquet
from studies.curricula.config import FAMILIES, GROWTHS, LENGTH
from synthetic import results
from synthetic.runs import Run

HERE = Path(__file__).parent
RESULTS, LENGTHS, RATES = HERE / "results.parquet", HERE / "by_length.csv", HERE / "learning_rates.json"
SHOWN = (16, 32, 64)  # shorter contexts, of which a model may forget how to answer


def main(runs: str | None = None) -> int:
    """Make the tables anew, from a sweep's folder of runs if one is given; returns the exit status."""
    if runs is not None:
        collect(Path(runs))
    text = (HERE / "README.md").read_text(encoding="utf-8")
    store.write_bytes(HERE / "README.md", filled(text).encode())
    return 0


def collect(runs: Path) -> None:
    """Keep what the finished runs of a sweep found."""
    table = analysis.load(str(runs))
    store.write_bytes(RESULTS, to_parquet(rows_of(table), results.EVALUATION))
    store.write_bytes(RATES, (runs / RATES.name).read_bytes())
    found = []
    for name in table.loc[(table["purpose"] == "report") & (table["kind"] == "final"), "run"].unique():
        run = Run(runs / name)
        found.append(run.by_length.assign(run=name)[["run", "length", "correct", "count"]])
    store.write_bytes(LENGTHS, pd.concat(found).to_csv(index=False).encode())


def filled(text: str) -> str:
    """README with its tables made anew."""
    everything = analysis.load(RESULTS)
    table = everything[everything["purpose"] == "report"]
    lengths = pd.read_csv(LENGTHS)
    return fill(
        text,
        {
            "growths": growths(table, lengths),
            "rates": rates(json.loads(RATES.read_text())),
            "cost": minutes(everything),
        },
    )


def growths(table: pd.DataFrame, lengths: pd.DataFrame) -> str:
    """A line per architecture and growth: seeds that got there, tokens, and accuracy by length."""
    outcomes = examples_to_threshold(table, by="tokens")
    share_right = (lengths["correct"] / lengths["count"]).groupby([lengths["run"], lengths["length"]]).first()
    rows = []
    for model in FAMILIES:
        for growth in GROWTHS:
            cell = outcomes[(outcomes["model"] == model) & (outcomes["growth"] == growth)].sort_values("seed")
            if cell.empty:
                continue
            accuracies = [by_seed([share_right[run, n] for run in cell["run"]], 2) for n in SHOWN]
            rows.append(
                [
                    NAMES[model], growth, share(cell["reached"].sum(), len(cell)), cost(cell),
                    by_seed(cell["accuracy"], 2), *accuracies,
                ]
            )  # fmt: skip
    head = ["model", "growth", "seeds at 0.95 [95 %]", "tokens to 0.95, median [95 % or less]"]
    return markdown([*head, f"accuracy at {LENGTH}", *(f"at {n}" for n in SHOWN)], rows)


def rates(rows: list[dict[str, Any]]) -> str:
    """The score of every learning rate, and which one was chosen."""
    lines = []
    for model in FAMILIES:
        for growth in GROWTHS:
            mine = [row for row in rows if (row["model"], row["growth"]) == (model, growth)]
            if mine:
                scores = [f"{row['scores'][0]:.3f}" for row in mine]
                lines.append([NAMES[model], growth, *scores, f"{mine[0]['lr']:g}"])
    candidates = list(dict.fromkeys(f"{row['candidate']:g}" for row in rows))
    return markdown(["model", "growth", *(f"score at {c}" for c in candidates), "chosen"], lines)


def minutes(table: pd.DataFrame) -> str:
    """How many runs there are and how long they took, in a sentence."""
    final = table[table["kind"] == "final"]
    return f"{len(final)} runs, {final['seconds'].sum() / 60:.0f} minutes on one thread."


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(*sys.argv[1:2])))
