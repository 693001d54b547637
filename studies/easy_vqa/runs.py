"""The study of README.md beside this file.

    python -m vlm.train studies/easy_vqa/runs.py --out runs/easy_vqa
    python -m vlm.evaluate studies/easy_vqa/runs.py --out runs/easy_vqa

First the learning rates: the first stage on seven in eight of the training pictures, and the others asked.
Then three seeds with the chosen rates, on all training pictures, and the test split asked.
"""

from __future__ import annotations

import dataclasses

from vlm.config import Files, Run
from vlm.configs.easy_vqa import MODELS, run, stage

TRIED = (2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2)
HELD_OUT = Files("easy-vqa", "train", options={"part": "val", "asked": "open"})


def rate(model: str, lr: float) -> Run:
    """Return the run that tries a learning rate."""
    return dataclasses.replace(
        run(model),
        name=f"{model.partition('-')[0]}-lr{lr:g}",
        stages=(stage("open", lr, part="fit"),),
        evaluation={"held-out": HELD_OUT},
    )


def get_config() -> list[Run]:
    """Return all runs of the study: every rate of both families, then every seed."""
    rates = [rate(model, lr) for lr in TRIED for model in MODELS]
    return rates + [run(model, seed) for seed in SEEDS for model in MODELS]
