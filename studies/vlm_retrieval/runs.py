"""The study of README.md beside this file.

    python -m vlm.train studies/vlm_retrieval/runs.py --out runs/vlm
    python -m vlm.evaluate studies/vlm_retrieval/runs.py --out runs/vlm

Every model begins with the language model of its family that knows scenes in words (vlm/configs/words.py),
and is trained on questions that look something up in a picture. A seed decides the connector's first weights
and which scenes are seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlm import pretrained
from vlm.config import Run, Scenes, Stage
from vlm.prompts import Layout

SEEDS = range(8)
IMAGES, HELDOUT = 8000, 400
PAPER = ("transformer", "mamba")  # the families that the paper compares
OTHERS = ("hybrid",)
# Peak rate of the second stage, by family: the best of rates.py on validation scenes.
RATES = {"transformer": 1.5e-3, "mamba": 1.5e-3, "hybrid": 1.5e-3}
WEIGHTS = {"attribute": 1.5, "existence": 1, "locate": 2, "grounding": 2}
# Of scenes of fewer shapes a model must hold less. "combination" has colours with shapes that no training
# picture shows.
EVALUATION = {
    "existence": Scenes("existence", HELDOUT, "heldout"),
    "attribute": Scenes("attribute", HELDOUT, "heldout"),
    "attribute-combination": Scenes("attribute", HELDOUT, "combination"),
    "grounding": Scenes("grounding", HELDOUT, "heldout"),
    "grounding-4shapes": Scenes("grounding", HELDOUT, "heldout", shapes=4),
    "grounding-2shapes": Scenes("grounding", HELDOUT, "heldout", shapes=2),
    "grounding-combination": Scenes("grounding", HELDOUT, "combination"),
}


@dataclass(frozen=True)
class Cell:
    """A condition of the study.

    Attributes:
        name: Its name in tables.
        families: Families that are trained in it.
        layout: Where the image stands.
        init: Language model that it begins with.
        encoder: Encoder, which decides the side of a patch.
        image_size: Pixels a side.
    """

    name: str
    families: tuple[str, ...] = PAPER
    layout: Layout = "agnostic"
    init: str = pretrained.SCENES
    encoder: str = "scenes-32px"
    image_size: int = 96


# Cells that compare layouts begin with language models that know questions before the scene as well: the
# others would have to learn that order from pictures.
CELLS = (
    Cell("base", (*PAPER, *OTHERS)),  # 9 patches
    Cell("16 patches", encoder="scenes-16px", image_size=64),
    Cell("36 patches", (*PAPER, *OTHERS), encoder="scenes-16px"),
    Cell("image-first", init=pretrained.ANY_ORDER),
    Cell("query-first", layout="query-first", init=pretrained.ANY_ORDER),
    Cell("instruction-first", layout="instruction-first", init=pretrained.ANY_ORDER),
    Cell("two-pass", layout="two-pass", init=pretrained.ANY_ORDER),
)


def stages(seed: int, lr: float) -> tuple[Stage, Stage]:
    """Return the connector's stage, and that of all weights at a peak rate of `lr`."""
    data = {task: Scenes(task, IMAGES, seed=seed, draws=16) for task in WEIGHTS}

    def stage(train: Literal["connector", "all"], steps: int, lr: float) -> Stage:
        return Stage(
            data, weights=WEIGHTS, train=train, steps=steps, lr=lr, batch_size=64, box_spread=1.5, group=8
        )

    return stage("connector", 100, 3e-3), stage("all", 1400, lr)


def run(cell: Cell, family: str, seed: int) -> Run:
    """Return the run of a family and seed in a cell."""
    return Run(
        name=f"{family}-{cell.name.replace(' ', '-')}-seed{seed}",
        model=f"{family}-tiny",
        stages=stages(seed, RATES[family]),
        evaluation=EVALUATION,
        init=cell.init,
        layout=cell.layout,
        encoder=cell.encoder,
        image_size=cell.image_size,
        seed=seed,
        max_new_tokens=24,
    )


def get_config() -> list[Run]:
    """Return all runs of the study, cell by cell."""
    return [run(cell, family, seed) for cell in CELLS for seed in SEEDS for family in cell.families]
