"""Both VLMs, tiny, on rendered scenes: `python -m vlm.train vlm/configs/cpu_tiny.py`.

The paper's order: a language model that knows scenes in words (vlm/configs/words.py) gets a frozen vision
encoder. First the connector alone is trained, then everything. Both families see the same data in the same
order.
"""

from __future__ import annotations

from typing import Literal

from vlm.config import Run, Scenes, Stage
from vlm.configs.words import MODELS, TASKS

IMAGES, HELDOUT, TURNS = 8000, 400, 3
# Shares of the tasks: what is read has one question a sample, and spatial relations and pointing come last.
WEIGHTS = {
    "existence": 0.7, "count": 1.5, "attribute": 0.7, "comparison": 0.7, "spatial": 3, "grounding": 2.5,
    "pointing": 3, "reading-digit": 3, "reading-word": 4, "caption": 1.5, "describe": 0.3,
}  # fmt: skip


def stages(seed: int) -> tuple[Stage, Stage]:
    """Return the stages of a model; `seed` decides which scenes it is trained on."""
    once = ("reading-digit", "reading-word", "caption")
    data = {
        task: Scenes(task, IMAGES, seed=seed, turns=1 if task in once else TURNS, draws=8) for task in WEIGHTS
    }

    def stage(train: Literal["connector", "all"], steps: int, lr: float) -> Stage:
        return Stage(
            data, weights=WEIGHTS, train=train, steps=steps, lr=lr, batch_size=64, box_spread=1.5, group=8
        )

    return stage("connector", 300, 3e-3), stage("all", 1200, 1.5e-3)


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
