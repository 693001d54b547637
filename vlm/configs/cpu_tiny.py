"""Both VLMs, tiny, on rendered scenes: `python -m vlm.train vlm/configs/cpu_tiny.py`.

The paper's order: a language model that knows scenes in words (vlm/configs/words.py) gets a frozen vision
encoder. First the connector alone is trained, then everything. Both families see the same data in the same
order.
"""

from __future__ import annotations

from vlm.config import Run, Scenes, Stage
from vlm.configs.words import MODELS, TASKS

IMAGES, HELDOUT = 8000, 400


def stages(seed: int) -> tuple[Stage, Stage]:
    """Return the stages of a model; `seed` decides which scenes it is trained on."""

    def seen(task: str, turns: int = 1) -> Scenes:
        return Scenes(task, IMAGES, seed=seed, turns=turns, draws=4)

    data = {
        "vqa": seen("vqa", 14), "locate": seen("locate", 6), "pointing": seen("pointing", 5),
        "describe": seen("describe", 6), "caption": seen("caption"),
    }  # fmt: skip
    weights = {"vqa": 5, "locate": 2, "pointing": 1, "describe": 1, "caption": 1.5}
    align = Stage(
        data, weights=weights, train="connector", steps=400, batch_size=32, lr=3e-3, box_spread=1.5, group=8
    )
    answer = Stage(data, weights=weights, steps=600, batch_size=32, lr=1e-3, box_spread=1.5, group=8)
    return align, answer


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
