"""Learning rates of this study: each family at each of three, in the base cell, on validation scenes.

    python -m vlm.train studies/vlm_retrieval/rates.py --out runs/vlm
    python -m vlm.evaluate studies/vlm_retrieval/rates.py --out runs/vlm
    python -m studies.vlm_retrieval.rates runs/vlm      # writes rates.csv and prints the best

Training pictures are of another seed than the study's, validation pictures of yet another.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from ssm_retrieval.training import store
from studies.vlm_retrieval.runs import CELLS, HELDOUT, OTHERS, PAPER, run, stages
from vlm.config import Run, Scenes
from vlm.results import table_path

HERE = Path(__file__).parent
TRIED = (7e-4, 1.5e-3, 3e-3)
SEED, VALIDATION = 100, 101
TASKS = ("existence", "attribute", "grounding")


def get_config() -> list[Run]:
    """Return every family at every rate."""
    evaluation = {task: Scenes(task, HELDOUT, seed=VALIDATION) for task in TASKS}
    return [
        dataclasses.replace(
            run(CELLS[0], family, SEED),
            name=f"{family}-rate{lr:g}",
            stages=stages(SEED, lr),
            evaluation=evaluation,
        )
        for family in (*PAPER, *OTHERS)
        for lr in TRIED
    ]


def main(out: Path) -> None:
    """Write rates.csv: right answers by family, rate and task, and their mean."""
    rows = []
    for one in get_config():
        found: Any = pd.read_parquet(table_path(out, one.name))
        found = found[found["metric"].isin(["accuracy", "iou@0.5"])].set_index("task")["value"]
        row = {"family": one.family, "lr": one.stages[-1].lr, **{task: found[task] for task in TASKS}}
        rows.append(row | {"mean": sum(found[task] for task in TASKS) / len(TASKS)})
    table = pd.DataFrame(rows)
    store.write_bytes(HERE / "rates.csv", table.to_csv(index=False, float_format="%.4f").encode())
    print(table.loc[table.groupby("family")["mean"].idxmax()].to_string(index=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
