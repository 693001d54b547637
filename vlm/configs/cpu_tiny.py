"""Both VLMs, tiny, on rendered scenes: `python -m vlm.train vlm/configs/cpu_tiny.py`.

A first stage learns to find what is described, alone: in a mixture of everything the lookup did not form
within as many steps. A short second one learns that there is something to read. The third adds all that is
asked: many questions about a scene in small batches, so that there are many steps; with larger batches or
rates few of the skills appeared in this time. Both families get the same data in the same order.
"""

from __future__ import annotations

from typing import Any

from vlm.config import Run, Scenes, Stage

IMAGES, HELDOUT = 8000, 400
TASKS = (
    "existence", "count", "attribute", "comparison", "spatial",
    "grounding", "pointing", "reading-digit", "reading-word",
)  # fmt: skip
# About half a million weights each; attention in two layers, as its lookups need two steps.
MODELS: dict[str, dict[str, Any]] = {
    "transformer-tiny": dict(n_head=2, init_std=0.06),
    "mamba-tiny": {},
}


def train(task: str, turns: int = 1) -> Scenes:
    return Scenes(task, IMAGES, turns=turns)


FIND = Stage(data={"locate": train("locate", 6)}, steps=1500, batch_size=32, lr=2e-3)
READ = Stage(
    data={"reading-word": train("reading-word"), "reading-digit": train("reading-digit")},
    weights={"reading-word": 1, "reading-digit": 1},
    steps=300,
    batch_size=32,
    lr=1.5e-3,
)
ANSWER = Stage(
    data={
        "questions": train("questions", 10),
        "locate": train("locate", 6),
        "pointing": train("pointing"),
        "caption": train("caption"),
    },
    weights={"questions": 7, "locate": 2.5, "pointing": 0.25, "caption": 0.25},
    steps=2500,
    batch_size=16,
    lr=1.5e-3,
)


def get_config() -> list[Run]:
    evaluation = {task: Scenes(task, HELDOUT, "heldout") for task in TASKS}
    return [
        Run(
            name=model.partition("-")[0],
            model=model,
            model_overrides=overrides,
            stages=(FIND, READ, ANSWER),
            evaluation=evaluation,
        )
        for model, overrides in MODELS.items()
    ]
