"""Language models that know scenes in words: `python -m vlm.train vlm/configs/words.py`.

The paper's models were language models before they saw a picture. This is that step in miniature: questions
and answers about scenes whose objects are given in words (`vlm.scenes.words`). Stages end when their losses
are low enough, and each asks for more: read what is written; look up attributes and boxes among two shapes,
four, six; then everything. `python -m vlm.pretrained` writes the language models of the runs to
vlm/scenes/pretrained, from where vlm/configs/cpu_tiny.py begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm.config import Run, Scenes, Stage
from vlm.prompts import LAYOUTS, Layout
from vlm.scenes.scene import MOST_SHAPES

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
# Not in the paper: a Mamba in which one block of four is attention.
OTHERS: dict[str, dict[str, Any]] = {
    "hybrid-tiny": dict(
        n_layer=4, d_model=112, pattern="M M A M", rotary_pct=1.0, ssm_init="identity", embedding_std=0.1
    ),
}
LR = 2e-3
READING = ("reading-digit", "reading-word")
ONCE = (*READING, "caption")  # asked once a scene


def told(task: str, turns: int = 1, shapes: int = MOST_SHAPES) -> Scenes:
    """Return scenes with questions of a task.

    Args:
        task: As for `Scenes`.
        turns: Most questions in a sample.
        shapes: Shapes of a scene.

    Returns:
        The data.
    """
    return Scenes(task, SCENES, seed=SEED, turns=turns, shapes=shapes)


READ = Stage(
    {task: told(task) for task in READING},
    steps=1000, batch_size=128, lr=LR, until={task: 0.05 for task in READING},
)  # fmt: skip


def practice(
    weights: Mapping[str, float],
    steps: int,
    *,
    turns: int = 1,
    batch_size: int = 128,
    lr: float = LR,
    shapes: Mapping[str, int] | None = None,
    until: Mapping[str, float] | None = None,
    layouts: tuple[Layout, ...] = (),
) -> Stage:
    """Return a stage in which each task is a source of its own.

    Among many kinds of questions, what a sample asks once would hardly be practised.

    Args:
        weights: Shares of the tasks.
        steps: Most steps.
        turns: Most questions in a sample, where a scene has several of a task.
        batch_size: Samples of a batch.
        lr: Peak learning rate.
        shapes: Shapes of the scenes of a task; all where a task is not named.
        until: As for `Stage`.
        layouts: As for `Stage`; with several, they take turns every two batches.

    Returns:
        The stage.
    """
    data = {
        task: told(task, 1 if task in ONCE else turns, (shapes or {}).get(task, MOST_SHAPES))
        for task in weights
    }
    return Stage(
        data, weights=weights, steps=steps, batch_size=batch_size, lr=lr, box_spread=1.5,
        group=2 if layouts else 8, until=until or {}, layouts=layouts,
    )  # fmt: skip


def lookups(shapes: int) -> Stage:
    """Return a stage in which attributes and boxes are looked up; it ends when both are found.

    Args:
        shapes: Shapes of a scene. The box of any of two, four or six has a loss of 0.73, 0.79 or 0.83; the
            right one of 0.66.

    Returns:
        The stage.
    """
    return Stage(
        {
            "attribute": told("attribute", 4, shapes), "existence": told("existence", 4, shapes),
            "locate": told("locate", shapes, shapes), "describe": told("describe", shapes, shapes),
        },
        weights={"attribute": 3, "existence": 2, "locate": 4, "describe": 1},
        steps=2500, batch_size=64, lr=LR, box_spread=1.5, group=8,
        until={"attribute": 0.05, "existence": 0.1, "locate": 0.8 if shapes < MOST_SHAPES else 0.85},
    )  # fmt: skip


def transformer_stages() -> tuple[Stage, ...]:
    """Return the stages of the Transformer: several questions a sample, then one."""
    find = tuple(lookups(shapes) for shapes in (2, 4, 6))
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
        {"locate": told("locate", 6), "attribute": told("attribute", 4)},
        weights={"locate": 9, "attribute": 1},
        steps=700, batch_size=64, lr=LR, box_spread=1.5, group=8, until={"locate": 0.7},
    )  # fmt: skip
    several = {
        "existence": 1, "count": 1.5, "attribute": 1.5, "comparison": 1, "spatial": 2, "grounding": 3.5,
        "pointing": 3, "reading-digit": 1, "reading-word": 1, "caption": 1.5, "describe": 0.5,
    }  # fmt: skip
    # Pointing stayed at chance for about 100,000 questions on two boxes; 15,000 later it was learned.
    two_boxes = {
        "reading-digit": 1, "reading-word": 1, "spatial": 4, "point": 6, "attribute": 1, "locate": 2,
        "count": 0.5, "existence": 0.3, "comparison": 1, "describe": 1, "grounding": 0.5, "caption": 1,
    }  # fmt: skip
    until_pointed = {
        "spatial": 2.5, "point": 9, "attribute": 0.5, "locate": 1.5, "describe": 1.5, "count": 0.7,
    }  # fmt: skip
    whole = {
        "existence": 0.7, "count": 2, "attribute": 1, "comparison": 1, "spatial": 3, "grounding": 2,
        "locate": 2, "pointing": 3, "point": 2, "describe": 0.7, "reading-digit": 0.7, "reading-word": 0.7,
        "caption": 1.2,
    }  # fmt: skip
    places = {
        "existence": 0.4, "count": 1.5, "attribute": 0.7, "comparison": 0.6, "spatial": 5, "grounding": 1.5,
        "locate": 1, "pointing": 4, "point": 2, "describe": 0.5, "reading-digit": 0.4, "reading-word": 0.4,
        "caption": 0.8,
    }  # fmt: skip
    return (
        READ, *find, everything, boxes,
        practice(several, 800, turns=4, batch_size=64),
        practice(two_boxes, 1000, shapes={"spatial": 2, "point": 2}),
        practice(until_pointed, 2500, shapes={"point": 2}, until={"point": 0.08}),
        practice(whole, 1500),
        practice(places, 1500),
    )  # fmt: skip


FIND = {
    "attribute": 3, "existence": 1.5, "locate": 3, "describe": 1, "reading-digit": 0.5, "reading-word": 0.75,
}  # fmt: skip
EVERYTHING = {
    "existence": 0.5, "count": 1, "attribute": 1.5, "comparison": 0.7, "spatial": 2, "placed": 1.5,
    "grounding": 1.5, "locate": 1.5, "pointing": 2, "point": 2, "describe": 0.7,
    "reading-digit": 0.7, "reading-word": 0.8, "caption": 1.3,
}  # fmt: skip


def one_question_stages(lr: float, first: Stage) -> tuple[Stage, ...]:
    """Return stages with one question a sample, for models with a state: with several they forget lookups.

    What is written in a scene is asked for throughout. Otherwise the vectors of its words, of which input and
    output share the table, are pushed together while other things are learned, and the words are lost.

    Args:
        lr: Peak learning rate; that of the last stage is four fifths of it.
        first: The stage before lookups.

    Returns:
        The stages.
    """
    found = {task: 0.08 for task in ("attribute", "existence")} | dict.fromkeys(READING, 0.1)
    more = {"placed": 2.5, "point": 2, "count": 1.5, "comparison": 1, "caption": 1}
    return (
        first,
        practice(
            FIND | {"placed": 2}, 2500, lr=lr, shapes=dict.fromkeys((*FIND, "placed"), 2),
            until=found | {"locate": 0.72},
        ),
        practice(
            FIND | {"placed": 2, "point": 1}, 2000, lr=lr,
            shapes=dict.fromkeys(FIND, 4) | {"placed": 2, "point": 2}, until=found | {"locate": 0.75},
        ),
        practice(FIND | more, 2500, lr=lr, shapes={"placed": 4, "point": 2}),
        practice(EVERYTHING, 2500, lr=0.8 * lr, shapes={"point": 3}),
    )  # fmt: skip


def mamba_stages() -> tuple[Stage, ...]:
    """Return the stages of Mamba, which looks things up while it learns to read."""
    weights = {
        "attribute": 3, "existence": 1, "locate": 3.5, "describe": 1, "reading-digit": 0.5,
        "reading-word": 0.75,
    }  # fmt: skip
    until = dict.fromkeys(("attribute", "existence", *READING), 0.1) | {"locate": 0.75}
    first = practice(weights, 2000, lr=1.2e-3, shapes=dict.fromkeys(weights, 2), until=until)
    return one_question_stages(1.2e-3, first)


def hybrid_stages() -> tuple[Stage, ...]:
    """Return the stages of the hybrid, which learns to read first."""
    return one_question_stages(1.5e-3, READ)


def any_order_stages(lr: float, before: tuple[Stage, ...] = ()) -> tuple[Stage, ...]:
    """Return stages that follow a family's own, with the question before the scene, behind it, or both.

    For comparisons of layouts: a model that has only seen questions behind scenes would have to learn the
    other orders from pictures.

    Args:
        lr: Peak learning rate; that of the last stage is four fifths of it.
        before: Stages before the last one.

    Returns:
        Lookups among two shapes, `before`, then everything.
    """
    # By steps: running losses go up and down with the layouts that take turns.
    return (
        practice(FIND, 1000, lr=lr, shapes=dict.fromkeys(FIND, 2), layouts=LAYOUTS),
        *before,
        practice(EVERYTHING, 1500, lr=0.8 * lr, shapes={"point": 3}, layouts=LAYOUTS),
    )


def mostly_before(shapes: int, steps: int) -> Stage:
    """Return lookups with most questions before the scene, where the Transformer learns them last.

    Args:
        shapes: Shapes of a scene.
        steps: Most steps; the stage ends when attributes and boxes are found.

    Returns:
        The stage.
    """
    return practice(
        FIND, steps, lr=LR, shapes=dict.fromkeys(FIND, shapes),
        layouts=("query-first", "query-first", "agnostic"),
        until={"attribute": 0.15, "existence": 0.12, "locate": 0.74 if shapes == 2 else 0.77},
    )  # fmt: skip


STAGES = {
    "transformer-tiny": transformer_stages, "mamba-tiny": mamba_stages,
    "hybrid-tiny": hybrid_stages,
}  # fmt: skip


ANY_ORDER = {
    "transformer-tiny": any_order_stages(
        LR, (mostly_before(2, 4000), mostly_before(4, 2500), mostly_before(6, 2500))
    ),
    "mamba-tiny": any_order_stages(1.2e-3),
}


def pretraining(name: str, model: str, stages: tuple[Stage, ...]) -> Run:
    """Return the run of a language model.

    Args:
        name: Name of the run; another than the quick start's, whose results may be in the same folder.
        model: One of MODELS or OTHERS.
        stages: Its stages.

    Returns:
        The run.
    """
    return Run(
        name=name,
        model=model,
        model_overrides=(MODELS | OTHERS)[model],
        stages=stages,
        evaluation={task: Scenes(task, HELDOUT, "heldout") for task in TASKS},
        encoder="words",
        image_size=96,
        max_new_tokens=64,
    )


def get_config() -> list[Run]:
    """Return one run per family, and one that goes on with questions in any order."""
    runs = [
        pretraining(model.replace("-tiny", "-words"), model, STAGES[model]()) for model in MODELS | OTHERS
    ]
    return runs + [
        pretraining(model.replace("-tiny", "-words-any-order"), model, STAGES[model]() + stages)
        for model, stages in ANY_ORDER.items()
    ]
