"""The default run of three seeds, which README.md and docs/claims.md report:

    for seed in 0 1 2; do python -m synthetic.run --seed $seed --out runs/default; done
    python -m studies.retrieval_cpu.default_run runs/default

Writes default_run.csv beside this file: a row per model, seed and context length.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from analysis.tables import by_seed
from ssm_retrieval.cli import guarded
from ssm_retrieval.errors import UserError
from ssm_retrieval.style import NAMES
from ssm_retrieval.tables import markdown
from ssm_retrieval.training import store
from ssm_retrieval.training.records import finished
from synthetic.runs import Run

MEASURED = Path(__file__).with_name("default_run.csv")
COLUMNS = ["model", "seed", "length", "correct", "count", "step", "tokens", "seconds"]


def collect(runs: str) -> pd.DataFrame:
    """What the finished runs of a folder answer by context length: `COLUMNS`.

    Raises:
        UserError: If the folder has none.
    """
    found = []
    for run in map(Run, filter(finished, store.runs_in(Path(runs)))):
        known = {name: run.result[name] for name in ("step", "tokens", "seconds")}
        found.append(run.by_length.assign(model=run.plan.family, seed=run.plan.seed, **known)[COLUMNS])
    if not found:
        raise UserError(f"RUNS {runs} has no finished run; give the folder of the default runs")
    return pd.concat(found).sort_values(["model", "seed", "length"], ascending=[False, True, True])


def table(measured: pd.DataFrame, shortest: int = 64) -> str:
    """Markdown: steps, and accuracy of every seed at context lengths from `shortest` on."""
    rows = []
    for model, mine in measured.groupby("model", sort=False):
        steps = mine.drop_duplicates("seed")["step"]
        long = mine[mine["length"] >= shortest].groupby("length")
        cells = [by_seed(cell["correct"] / cell["count"]) for _, cell in long]
        rows.append([NAMES[str(model)], ", ".join(f"{step:,}" for step in steps), *cells])
    lengths = sorted(set(measured["length"][measured["length"] >= shortest]))
    return markdown(["model", "steps", *(f"at {length:,}" for length in lengths)], rows)


def main(runs: str) -> int:
    """Measure the runs of a folder; returns the exit status."""
    store.write_bytes(MEASURED, collect(runs).to_csv(index=False).encode())
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(*sys.argv[1:2])))
