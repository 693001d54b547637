"""The study of README.md beside this file.

    python -m vlm.train studies/vlm-cpu/config.py --out runs/vlm-cpu

Every model learns all three layouts, those of consecutive batches taking turns, and is then asked in each:
the same weights, the same questions, only the place of the image differs. It learns to find things at 64
pixels; from there one copy goes on at 64 and one at 96.
"""

from __future__ import annotations

from typing import Any

from vlm.config import Run, Scenes, Stage
from vlm.prompts import LAYOUTS

SEEDS = (0, 1, 2)
SIZES = (64, 96)  # pixels a side: 8 x 8 and 12 x 12 patches
IMAGES, HELDOUT = 8000, 400
TASKS = (
    "existence", "count", "attribute", "comparison", "spatial",
    "grounding", "pointing", "reading-digit", "reading-word", "caption",
)  # fmt: skip
# As in vlm/configs/cpu_tiny.py: about half a million weights each.
MODELS: dict[str, dict[str, Any]] = {
    "transformer-tiny": dict(n_head=2, init_std=0.06),
    "mamba-tiny": {},
}
FIND = Stage(
    data={"locate": Scenes("locate", IMAGES, turns=6)},
    steps=1500, batch_size=32, lr=2e-3, layouts=LAYOUTS, image_size=64,
)  # fmt: skip
# Three turns, not six: of several turns only the first has its query before the image.
ANSWER = Stage(
    data={
        name: Scenes(name, IMAGES, turns=3) for name in ("locate", "vqa", "pointing", "describe", "caption")
    },
    weights={"locate": 3, "vqa": 6, "pointing": 0.5, "describe": 0.25, "caption": 0.25},
    steps=1200, batch_size=40, lr=2e-3, layouts=LAYOUTS,
)  # fmt: skip
# Colours with shapes that no training image shows.
EVALUATION = {task: Scenes(task, HELDOUT, "heldout") for task in TASKS} | {
    "grounding-combination": Scenes("grounding", HELDOUT, "combination")
}


def get_config() -> list[Run]:
    return [
        Run(
            name=f"{model.partition('-')[0]}-{layout}-{size}px-seed{seed}",
            model=model,
            model_overrides=overrides,
            stages=(FIND, ANSWER),
            evaluation=EVALUATION,
            layout=layout,
            image_size=size,
            seed=seed,
            max_new_tokens=50,  # captions name eight objects
        )
        for size in SIZES
        for seed in SEEDS
        for model, overrides in MODELS.items()
        for layout in LAYOUTS
    ]
