"""Language models that know scenes in words: `python -m vlm.train vlm/configs/words.py`.

The paper's models were language models before they saw a picture. This is that step in miniature: questions
and answers about scenes whose objects are given in words (`vlm.scenes.words`). Stages end when their losses
are low enough, and each asks for more: read what is written; look up attributes and boxes among two shapes,
four, six; then everything. `python -m vlm.pretrained` writes the language models of the runs to
vlm/scenes/pretrained, from where vlm/configs/cpu_tiny.py begins.
"""

from __future__ import annotations

from typing import Any

from vlm.config import Run, Scenes, Stage

SCENES, HELDOUT, SEED = 200_000, 200, 1  # another seed than that of pictures
TASKS = (
    "existence", "count", "attribute", "comparison", "spatial",
    "grounding", "pointing", "reading-digit", "reading-word", "caption",
)  # fmt: skip
# About half a million weights each, in four layers.
MODELS: dict[str, dict[str, Any]] = {
    "transformer-tiny": dict(
        n_layer=4, d_model=96, n_head=3, rotary_pct=1.0, init_std=0.06, embedding_std=0.1
    ),
    # The convolution begins as the identity: else a place's key is mixed with those of the places before it.
    "mamba-tiny": dict(ssm_init="identity", embedding_std=0.1),
}
LR = 2e-3
# Questions in a sample while lookups form. Mamba's state holds all questions of a sample: with several it
# stays at chance for as many steps as the Transformer needs to learn (docs/vlm.md).
TURNS = {"transformer-tiny": 4, "mamba-tiny": 1}


# Shares of the tasks in the last stage.
WEIGHTS = {
    "existence": 1, "count": 1.5, "attribute": 1.5, "comparison": 1, "spatial": 2, "grounding": 3.5,
    "pointing": 3, "reading-digit": 1, "reading-word": 1, "caption": 1.5, "describe": 0.5,
}  # fmt: skip


def told(task: str, turns: int = 1, shapes: int = 6) -> Scenes:
    """Return scenes with questions of a task.

    Args:
        task: As for `Scenes`.
        turns: Most questions in a sample.
        shapes: Shapes of a scene.

    Returns:
        The data.
    """
    return Scenes(task, SCENES, seed=SEED, turns=turns, shapes=shapes)


def stages(most: int) -> tuple[Stage, ...]:
    """Return the stages of a model.

    Args:
        most: Questions in a sample while lookups form.

    Returns:
        Stages for `Run`.
    """
    read = Stage(
        {task: told(task) for task in ("reading-digit", "reading-word")},
        steps=1000, batch_size=128, lr=LR, until={"reading-digit": 0.05, "reading-word": 0.05},
    )  # fmt: skip
    # The box of any shape has a loss of 0.73, 0.79, 0.83 among two, four and six shapes; the right one 0.66.
    find = tuple(
        Stage(
            {
                "attribute": told("attribute", most, shapes), "existence": told("existence", most, shapes),
                "locate": told("locate", shapes if most > 1 else 1, shapes),
                "describe": told("describe", shapes if most > 1 else 1, shapes),
            },
            weights={"attribute": 3, "existence": 2, "locate": 4, "describe": 1},
            steps=2500, batch_size=64 if most > 1 else 128, lr=LR, box_spread=1.5, group=8,
            until={"attribute": 0.05, "existence": 0.1, "locate": 0.8 if shapes < 6 else 0.85},
        )
        for shapes in ((2, 4, 6) if most > 1 else (2, 4))
    )  # fmt: skip
    everything = Stage(
        {
            "vqa": told("vqa", 14), "locate": told("locate", 6), "pointing": told("pointing", 5),
            "describe": told("describe", 6), "caption": told("caption"),
        },
        weights={"vqa": 5, "locate": 2, "pointing": 2, "describe": 0.5, "caption": 1.5},
        steps=1500, batch_size=32, lr=LR, box_spread=1.5, group=8,
    )  # fmt: skip
    # The other numbers of a box can be told from the first one, whatever was asked for. Among other tasks the
    # first is so small a part of the loss that it remains a guess.
    boxes = Stage(
        {"locate": told("locate", 6), "attribute": told("attribute", most)},
        weights={"locate": 9, "attribute": 1},
        steps=700, batch_size=64, lr=LR, box_spread=1.5, group=8, until={"locate": 0.7},
    )  # fmt: skip
    # Each task is a source of its own, or what a sample asks once among many would hardly be practised.
    once = ("reading-digit", "reading-word", "caption")
    practice = Stage(
        {task: told(task, 1 if task in once else most) for task in WEIGHTS},
        weights=WEIGHTS,
        steps=800, batch_size=64 if most > 1 else 128, lr=LR, box_spread=1.5, group=8,
    )  # fmt: skip
    return (read, *find, everything, boxes, practice) if most > 1 else (read, *find)


def get_config() -> list[Run]:
    """Return one run per family."""
    return [
        Run(
            name=model.partition("-")[0],
            model=model,
            model_overrides=overrides,
            stages=stages(TURNS[model]),
            evaluation={task: Scenes(task, HELDOUT, "heldout") for task in TASKS},
            encoder="words",
            image_size=96,
            max_new_tokens=64,
        )
        for model, overrides in MODELS.items()
    ]
