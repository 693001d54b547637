"""The study of README.md beside this file.

    python -m vlm.train studies/vlm_cpu/runs.py --out runs/vlm_cpu

Models of one family and seed learn together to find what is described, the three layouts taking turns; from
there a copy for each layout goes on alone, and one at the higher resolution.
"""

from __future__ import annotations

from typing import Any

from vlm.config import Run, Scenes, Stage
from vlm.prompts import Layout

SEEDS = (0, 1, 2)
LAYOUTS: tuple[Layout, ...] = ("agnostic", "instruction-first", "query-first")
SIZES = (64, 96)  # pixels a side: 8 x 8 and 12 x 12 patches
IMAGES, HELDOUT = 8000, 400
# Counting, comparing, spatial relations, pointing and digits stay at chance for longer than a run has here.
TASKS = ("existence", "attribute", "grounding", "reading-word", "caption")
# As in vlm/configs/cpu_tiny.py: about half a million weights each.
MODELS: dict[str, dict[str, Any]] = {
    "transformer-tiny": dict(n_head=2, init_std=0.06),
    "mamba-tiny": {},
}
FIND = Stage(
    data={"locate": Scenes("locate", IMAGES, turns=6)},
    steps=1500, batch_size=32, lr=2e-3, layouts=LAYOUTS, image_size=64,
)  # fmt: skip
# One question an image: of several only the first one can stand before it.
ANSWER = Stage(
    data={
        name: Scenes(name, IMAGES) for name in ("locate", "existence", "attribute", "reading-word", "caption")
    },
    weights={"locate": 2, "existence": 1, "attribute": 1, "reading-word": 1, "caption": 0.5},
    steps=1200, batch_size=32, lr=2e-3,
)  # fmt: skip
# Colours with shapes that no training image shows.
EVALUATION = {task: Scenes(task, HELDOUT, "heldout") for task in TASKS} | {
    "grounding-combination": Scenes("grounding", HELDOUT, "combination")
}
CELLS = [(layout, SIZES[0]) for layout in LAYOUTS] + [("agnostic", SIZES[1])]


def get_config() -> list[Run]:
    """All runs of the study: every seed, layout, resolution and model."""
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
            precision="bf16",
            max_new_tokens=50,  # captions name eight objects
        )
        for seed in SEEDS
        for layout, size in CELLS
        for model, overrides in MODELS.items()
    ]
