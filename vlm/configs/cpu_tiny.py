"""Both VLMs, tiny, on rendered scenes: `python -m vlm.train vlm/configs/cpu_tiny.py`.

The first stage only learns to find what is described: in a mixture of all tasks the lookup did not form
within as many steps. The second stage adds the other tasks. Both families see the same data in the same
order.
"""

from __future__ import annotations

from typing import Any

from vlm.config import Run, Scenes, Stage

IMAGES, TURNS, HELDOUT = 8000, 6, 400
TASKS = (
    "existence", "count", "attribute", "comparison", "spatial",
    "grounding", "pointing", "reading-digit", "reading-word",
)  # fmt: skip
# About half a million weights each. Two layers of attention, because a lookup takes two steps.
MODELS: dict[str, dict[str, Any]] = {
    "transformer-tiny": dict(n_head=2, init_std=0.06),
    "mamba-tiny": {},
}


def train(task: str) -> Scenes:
    """Return the training samples of a task."""
    return Scenes(task, IMAGES, turns=TURNS)


FIND = Stage(data={"locate": train("locate")}, steps=1500, batch_size=32, lr=2e-3)
ANSWER = Stage(
    data={name: train(name) for name in ("locate", "vqa", "pointing", "describe", "caption")},
    weights={"locate": 3, "vqa": 6, "pointing": 0.5, "describe": 0.25, "caption": 0.25},
    steps=1500,
    batch_size=32,
    lr=2e-3,
)


def get_config() -> list[Run]:
    """Return one run per family."""
    evaluation = {task: Scenes(task, HELDOUT, "heldout") for task in TASKS}
    return [
        Run(
            name=model.partition("-")[0],
            model=model,
            model_overrides=overrides,
            stages=(FIND, ANSWER),
            evaluation=evaluation,
        )
        for model, overrides in MODELS.items()
    ]
