"""Both VLMs, tiny, on rendered scenes: `python -m vlm.train vlm/configs/cpu_tiny.py`.

The paper's order: a language model that knows scenes in words (vlm/configs/words.py) gets a frozen vision
encoder. First the connector alone is trained, then everything. Both families see the same data in the same
order.
"""

from __future__ import annotations

from typing import Literal

from vlm.config import Run, Scenes, Stage
from vlm.configs.words import MODELS, TASKS

IMAGES, HELDOUT = 8000, 400
# Shares of the tasks. Samples have one question each: with several, Mamba forgets what it looks up.
WEIGHTS = {
    "existence": 0.5, "count": 1.5, "attribute": 1, "comparison": 0.5, "spatial": 2.5, "grounding": 4,
    "pointing": 4.5, "reading-digit": 1.5, "reading-word": 1, "caption": 1.5, "describe": 0.5,
}  # fmt: skip


def stages(seed: int) -> tuple[Stage, Stage]:
    """Return the stages of a model; `seed` decides which scenes it is trained on."""
    data = {task: Scenes(task, IMAGES, seed=seed, draws=16) for task in WEIGHTS}

    def stage(train: Literal["connector", "all"], steps: int, lr: float) -> Stage:
        return Stage(
            data, weights=WEIGHTS, train=train, steps=steps, lr=lr, batch_size=128, box_spread=1.5, group=8
        )

    return stage("connector", 300, 3e-3), stage("all", 2200, 1.5e-3)


def run(model: str, seed: int = 0) -> Run:
    """Return the run of a model of vlm/configs/words.py."""
    return Run(
        name=model.partition("-")[0] if not seed else f"{model.partition('-')[0]}-seed{seed}",
        model=model,
        stages=stages(seed),
        evaluation={task: Scenes(task, HELDOUT, "heldout") for task in TASKS},
        init="scenes",
        encoder="scenes-32px",
        image_size=96,
        seed=seed,
        max_new_tokens=64,
    )


def get_config() -> list[Run]:
    """Return one run per family."""
    return [run(model) for model in MODELS]
