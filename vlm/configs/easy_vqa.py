"""Both VLMs, tiny, on easy-VQA: `pip install easy-vqa`, then `python -m vlm.train vlm/configs/easy_vqa.py`.

Both families see the same data in the same order, through the same frozen encoder. The first stage only asks
for colors and shapes: among the questions of yes or no, three in four, shapes were not learned within as many
steps. The second stage has all questions.
"""

from __future__ import annotations

from vlm.config import Files, Run, Stage
from vlm.configs.words import MODELS

# Chosen among three on held-out training pictures (studies/easy_vqa).
RATES = {"transformer-tiny": 4e-3, "mamba-tiny": 2e-3}
STEPS = {"open": 500, "all": 2200}  # by what is asked


def stage(asked: str, lr: float, part: str = "all") -> Stage:
    """Return a stage of training.

    Args:
        asked: Key of STEPS, an option of `vlm.data.easy_vqa.easy_vqa`.
        lr: Peak learning rate.
        part: As for `vlm.data.easy_vqa.easy_vqa`.

    Returns:
        The stage.
    """
    data = Files("easy-vqa", "train", options={"part": part, "asked": asked})
    return Stage({"easy-vqa": data}, steps=STEPS[asked], batch_size=32, lr=lr)


def run(model: str, seed: int = 0) -> Run:
    """Return a run.

    Args:
        model: Key of MODELS.
        seed: Seed of weights and order of data.

    Returns:
        The run.
    """
    return Run(
        name=f"{model.partition('-')[0]}-seed{seed}",
        model=model,
        model_overrides=MODELS[model],
        stages=tuple(stage(asked, RATES[model]) for asked in STEPS),
        evaluation={"easy-vqa": Files("easy-vqa", "test")},
        tokenizer="own",
        seed=seed,
        max_new_tokens=4,
    )


def get_config() -> list[Run]:
    """Return one run per family."""
    return [run(model) for model in MODELS]
