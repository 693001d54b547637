"""Scenes in words with the question before or behind them: do the language models know every order?

    python -m vlm.train vlm/configs/words.py --out runs/vlm
    python -m studies.vlm_retrieval.orders runs/vlm           # writes orders.csv

The cells of runs.py that compare layouts begin with models that were trained in all layouts. This is what
those know before they see pictures, beside those of the other cells, which were trained with the scene first.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from analysis.vlm_plots import MAIN
from ssm_retrieval.training import store
from studies.vlm_retrieval.runs import PAPER
from vlm import answering, components, pretrained
from vlm.config import Run, Scenes, read_file
from vlm.evaluate import answer_all
from vlm.prompts import LAYOUTS
from vlm.results import score

HERE = Path(__file__).parent
QUESTIONS = 400
TASKS = ("existence", "attribute", "grounding")


def asked(run: Run, out: Path) -> list[dict[str, Any]]:
    """Return a row for every layout and task: the share of right answers."""
    model = answering.load(run, out)
    told: Any = components.features(run, run.image_size, out)
    side, rows = components.eyes_of(run, out).side, []
    for layout in LAYOUTS:
        for task in TASKS:
            source = Scenes(task, QUESTIONS, "heldout").build(answers=False)
            told.fill(source, progress=False)
            samples = [source[i] for i in range(QUESTIONS)]
            other = dataclasses.replace(run, layout=layout, max_new_tokens=24)
            said = answer_all(model, other, told, source, samples, side, "cpu")
            (share,) = (row["value"] for row in score(samples, said) if row["metric"] in MAIN)
            about = {"family": run.family, "init": pretrained.kind_of(run)}
            rows.append(about | {"layout": layout, "task": task, "right": share, "questions": QUESTIONS})
    return rows


def main(out: Path) -> None:
    """Write orders.csv."""
    torch.set_num_threads(1)
    runs = [run for run in read_file(pretrained.CONFIG) if run.family in PAPER]
    table = pd.DataFrame([row for run in runs for row in asked(run, out)])
    store.write_bytes(HERE / "orders.csv", table.to_csv(index=False, float_format="%.4f").encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
