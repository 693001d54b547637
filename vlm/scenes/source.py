"""Rendered scenes as samples: one per image, of one task, in the wording of `vlm.prompts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ssm_retrieval.errors import UserError
from vlm import prompts
from vlm.data.samples import Sample
from vlm.prompts import Chunk, box_text
from vlm.scenes import TASKS, VERSION, Example, Object, Scene, make_example, render, sample_scene
from vlm.scenes.questions import DRAW_STEP, MAX_DRAWS, phrase, unique_phrases
from vlm.scenes.scene import MOST_SHAPES, scene_stream

READING = ("reading-digit", "reading-word")  # a scene has one digit and one word: asked once a sample
ASKED = ("existence", "count", "attribute", "comparison", "spatial")
PACKED = ("describe", "vqa", "locate", "point", "placed")  # sources of several turns
SOURCES = (*TASKS, *PACKED)
_TURN_INDEX = 2**61  # keeps the streams here apart from those of scenes and questions


class SceneSource:
    """Samples of one task; sample i is about scene i modulo `images`.

    Args:
        task: One of `vlm.scenes.TASKS`, or one of PACKED: "vqa" (short questions of all kinds), "locate"
            (boxes of different shapes), "describe" (descriptions of boxes), "point" (pointing, where half of
            the questions say all that can be said of the shape), "placed" (spatial questions, where either
            shape is as often given by its box).
        images: Number of scenes.
        seed: Seed of the scenes.
        split: "train", "heldout" or "combination".
        turns: Most questions in a sample. One that comes up twice is asked once; captions have one turn.
        draws: Samples of each scene, with questions of their own.
        shapes: Shapes of a scene (`sample_scene`).
        answers: Whether prompts contain the answers; if not, they are in `Sample.target`.

    Raises:
        UserError: If the task is unknown, several questions are asked without answers, or there are too many
            questions about a scene.
    """

    def __init__(
        self,
        task: str,
        images: int,
        *,
        seed: int = 0,
        split: str = "train",
        turns: int = 1,
        draws: int = 1,
        shapes: int = MOST_SHAPES,
        answers: bool = True,
    ):
        if task not in SOURCES:
            raise UserError(f"task {task!r} of scenes is unknown; use {', '.join(SOURCES)}")
        if turns * draws > MAX_DRAWS:
            raise UserError(f"turns={turns} x draws={draws} must be at most {MAX_DRAWS}; lower one of them")
        self.name, self.images, self.seed, self.split = task, images, seed, split
        self.turns, self.draws, self.shapes, self.answers = turns, draws, shapes, answers
        self.scene("0")  # checks the rest
        fewer = "" if shapes == MOST_SHAPES else f"-{shapes}shapes"
        self.fingerprint = f"scenes-v{VERSION}-{split}-seed{seed}{fewer}"

    def __len__(self) -> int:
        return self.images * self.draws

    def keys(self) -> Sequence[str]:
        """Return the scenes' numbers as text."""
        return [str(i) for i in range(self.images)]

    def scene(self, image: str) -> Scene:
        """Return the scene of a picture by its key."""
        return sample_scene(self.seed, self.split, int(image), shapes=self.shapes)

    def picture(self, image: str) -> npt.NDArray[np.uint8]:
        """Render a scene, (128, 128, 3) uint8, RGB."""
        return render(self.scene(image))

    def __getitem__(self, index: int) -> Sample:
        draw, number = divmod(index, self.images)
        scene = self.scene(str(number))
        rng = scene_stream(self.seed, self.split, _TURN_INDEX + draw * DRAW_STEP + number)
        target: dict[str, Any] = {}
        if self.name in ("locate", "describe"):
            chosen = [scene.shapes[k] for k in rng.permutation(len(scene.shapes))[: self.turns]]
            if self.name == "locate":
                named = [_named(scene, item, rng) for item in chosen]
                turns = [(text, item.box) for text, item in zip(named, chosen, strict=True)]
                chunks = prompts.grounding(turns, scene.size, scene.size)
            else:
                described = [(item.box, full_phrase(item)) for item in chosen]
                chunks = prompts.dense_captioning(described, scene.size, scene.size)
        else:
            task, changed = PRACTISED.get(self.name, (self.name, None))
            kinds = mixed(rng, self.turns) if task == "vqa" else [task] * self.turns
            examples = [
                make_example(scene, kind, draw * self.turns + turn) for turn, kind in enumerate(kinds)
            ]
            if changed is not None:
                examples = [changed(e, rng) for e in examples]
            different = list({(e.question, e.boxes): e for e in examples}.values())
            chunks = conversation(different, answers=self.answers)
            if len(examples) == 1:
                target = answer(examples[0])
        id_ = str(number) if self.draws == 1 else f"{number}.{draw}"
        return Sample(id_, self.name, str(number), self.name, tuple(chunks), target)


def mixed(rng: np.random.Generator, turns: int) -> list[str]:
    """Draw kinds of questions: all of them in turn, but what is written in the picture only once."""
    kinds = [*rng.permutation([*ASKED, *READING])]
    while len(kinds) < turns:
        kinds += [*rng.permutation(ASKED)]
    return [str(kind) for kind in kinds[:turns]]


def conversation(examples: Sequence[Example], *, answers: bool) -> list[Chunk]:
    """Return the prompt of several examples of one scene and one form of answer.

    Args:
        examples: Examples, all of captions, of grounding, of pointing, or of short answers.
        answers: Whether with their answers.

    Returns:
        The prompt.
    """
    first, size = examples[0], examples[0].scene.size
    if first.task == "caption":
        return prompts.captioning(first.answer if answers else None)
    if first.task == "grounding":
        return prompts.grounding(
            [(referred(e), e.boxes[0] if answers else None) for e in examples], size, size
        )
    if first.task == "pointing":
        right = [e.choices.index(e.answer) if answers else None for e in examples]
        asked = [(e.question, e.boxes, one) for e, one in zip(examples, right, strict=True)]
        return prompts.pointing(asked, size, size)
    return prompts.vqa([(e.question, e.answer if answers else None) for e in examples])


def referred(example: Example) -> str:
    """Return the phrase of a grounding question: "Where is the red star?" -> "the red star"."""
    return example.question.removeprefix("Where is ").removesuffix("?")


def answer(example: Example) -> dict[str, Any]:
    """Return what metrics need: the answer, the box in pixels (grounding), or reference captions."""
    if example.task == "caption":
        return {"captions": [example.answer]}
    target: dict[str, Any] = {"answer": example.answer}
    if example.task == "grounding":
        target |= {"box": list(example.boxes[0]), "width": example.scene.size, "height": example.scene.size}
    return target


def _named(scene: Scene, item: Object, rng: np.random.Generator) -> str:
    """A shortest phrase that fits `item` alone or, as often, everything that can be said of it.

    With full phrases a model that knows one kind of attribute finds most objects, and learns the rest there.
    """
    short = unique_phrases(scene, item)
    return full_phrase(item) if rng.integers(2) else short[int(rng.integers(len(short)))]


def _renamed(example: Example, rng: np.random.Generator) -> Example:
    """A pointing question whose phrase is that of `_named`."""
    right = example.boxes[example.choices.index(example.answer)]
    item = next(one for one in example.scene.shapes if one.box == right)
    return replace(example, question=f"Which box shows the {_named(example.scene, item, rng)}?")


def _placed(example: Example, rng: np.random.Generator) -> Example:
    """A spatial question in which each shape is given by its box, half of the time.

    Of two boxes only numbers must be compared, of one box and one phrase one shape must be found.
    """
    question, size = example.question, example.scene.size
    by_box = {item.box: phrase(item, ("colour", "name")) for item in example.scene.shapes}
    for box in example.boxes:
        if rng.integers(2):
            question = question.replace(f"the {by_box[box]}", box_text(box, size, size))
    return replace(example, question=question)


def full_phrase(item: Object) -> str:
    """Return everything that can be said of an object."""
    return phrase(item, ("size", "texture", "colour", "name"))


# Sources that ask a task's questions in another wording.
PRACTISED = {"point": ("pointing", _renamed), "placed": ("spatial", _placed)}
