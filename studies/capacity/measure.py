"""How many facts the trained models of this study recall, of few and of many.

    python -m studies.capacity.measure runs/capacity runs/recall_law_linear

A training gives a whole curve: `measured.csv` beside this file has a row for each run and number of facts.
Runs that are already there are not measured again, so the command may be given while a sweep is going on.
Rows of runs that are in none of the folders are dropped.

position: what a run found at its end: contexts of every length that training came to, one question a
          sequence. Lengths that it did not come to say nothing of the room in a state, and are left out.
mqar:     n pairs in 4 n tokens, all of them queried, as in training, which had one n. Models with position
          vectors are asked up to the length of their training.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from analysis.plots.recall_law import SHAPE
from ssm_retrieval.cli import guarded, use_threads
from ssm_retrieval.errors import UserError
from ssm_retrieval.models import LanguageModel
from ssm_retrieval.training import store
from ssm_retrieval.training.records import environment, finished
from synthetic.evaluate import evaluate
from synthetic.runs import Run
from synthetic.tasks import Task
from synthetic.tasks.mqar import Mqar
from synthetic.tasks.position import Position

HERE = Path(__file__).parent
MEASURED = HERE / "measured.csv"
PAIRS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
SEQUENCES = 512  # of mqar, for each number of pairs
ANSWERS = ("n_facts", "correct", "count", "chance")
COLUMNS = (
    "task", "model", "n_layer", "d_model", "d_state", "vocab_size", "seed", "trained_facts", "n_facts",
    "numbers", "correct", "count", "chance", "seconds", "run", "commit",
)  # fmt: skip


def main(*folders: str) -> int:
    """Measure what is finished in these folders of runs; returns the exit status.

    Raises:
        UserError: If no folder is given, or one does not exist.
    """
    if not folders:
        raise UserError("RUNS is missing; give folders of runs, such as runs/capacity")
    use_threads(1)
    runs = {run.name: run for folder in folders for run in _finished(Path(folder))}
    known = pd.read_csv(MEASURED) if MEASURED.exists() else pd.DataFrame(columns=list(COLUMNS))
    known = known[known["run"].isin(runs)]
    store.write_bytes(MEASURED, known.to_csv(index=False).encode())
    for name in runs.keys() - set(known["run"]):
        known = pd.concat([known, curve(Run(runs[name]))], ignore_index=True)[list(COLUMNS)]
        known = known.sort_values([*SHAPE, "seed", "n_facts"], ignore_index=True)
        store.write_bytes(MEASURED, known.to_csv(index=False).encode())
        print(name, flush=True)
    return 0


def _finished(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"RUNS {folder} does not exist; run the sweep first")
    return [run for run in sorted(folder.iterdir()) if finished(run)]


def curve(run: Run) -> pd.DataFrame:
    """Right answers of a trained model by the number of facts.

    Args:
        run: A finished run of the tasks position or mqar.

    Returns:
        A row per number of facts, with `COLUMNS`. `trained_facts` is the most that training came to, and
        `numbers` what the cache holds when the context has been read and no question yet; n_layer counts all
        blocks; seconds are those of the training.

    Raises:
        UserError: If the run is of another task.
    """
    task, model = run.task, run.model()
    shape: Any = model.config
    fixed = dict(
        task=run.plan.task,
        model=run.plan.family,
        n_layer=shape.n_layer,
        d_model=shape.d_model,
        d_state=getattr(shape, "d_state", None),
        vocab_size=shape.vocab_size,
        seed=run.plan.seed,
        seconds=run.result["seconds"],
        run=run.folder.name,
        commit=environment(run.folder)["sessions"][-1].get("commit"),
    )
    if isinstance(task, Mqar):
        trained, found = task.num_pairs, asked(model, task)
    elif isinstance(task, Position):
        trained, found = run.result["train_length"], run.by_length.rename(columns={"length": "n_facts"})
        found = found.loc[found["n_facts"] <= trained, list(ANSWERS)]
    else:
        raise UserError(f"task {task.name} is not of this study; give runs of position or mqar")
    numbers = [numbers_held(model, task, n) for n in found["n_facts"]]
    return found.assign(**fixed, trained_facts=trained, numbers=numbers)[list(COLUMNS)]


def asked(model: LanguageModel, task: Mqar) -> pd.DataFrame:
    """Right answers of a model by the number of pairs.

    Args:
        model: What answers.
        task: What it was trained on.

    Returns:
        A row per number of pairs: up to `task.num_pairs` if the model has position vectors, which end where
        training did.
    """
    shape: Any = model.config
    rows = []
    for n in PAIRS:
        if n > task.num_pairs and shape.position == "learned":
            break
        longer = dataclasses.replace(task, num_pairs=n, seq_len=4 * n)
        found = evaluate(model, longer, examples=SEQUENCES, length=4 * n, device="cpu", precision="float32")
        rows.append((n, int(found.correct.sum()), len(found.correct), found.chance))
    return pd.DataFrame(rows, columns=list(ANSWERS))


@torch.no_grad()
def numbers_held(model: LanguageModel, task: Task, n: int) -> int:
    """What a model keeps of a sequence when it has read n facts and no question yet, counted in its cache."""
    tokens = 2 * n if isinstance(task, Mqar) else 1 + n
    cache = model.init_cache()
    model(torch.zeros(1, tokens, dtype=torch.int64), cache=cache)
    return cache.num_elements()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(*sys.argv[1:])))
