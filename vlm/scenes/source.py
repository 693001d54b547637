"""Rendered scenes as samples: one per image, of one task, in the wording of `vlm.prompts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ssm_retrieval.errors import UserError
from vlm import prompts
from vlm.data.samples import Sample
from vlm.prompts import Chunk
from vlm.scenes import TASKS, VERSION, Example, Object, Scene, make_example, render, sample_scene
from vlm.scenes.questions import phrase, unique_phrases
from vlm.scenes.scene import scene_stream

QUESTIONS = ("existence", "count", "attribute", "comparison", "spatial", "reading-digit", "reading-word")
PACKED = ("describe", "vqa", "locate")  # sources of several turns
SOURCES = (*TASKS, *PACKED)
_TURN_INDEX = 2**61  # keeps the streams here apart from those of scenes and questions


class SceneSource:
    """Samples of one task; sample i is about scene i.

    Args:
        task: One of `vlm.scenes.TASKS`, or one that asks several questions about an image: "vqa" (questions
            of different kinds), "locate" (boxes of phrases), "describe" (descriptions of boxes).
        images: Number of scenes.
        seed: Seed of the scenes.
        split: "train", "heldout" or "combination".
        turns: Questions about an image, for the tasks that ask several; the others ignore it.
        answers: Whether prompts contain the answers; if not, they are in `Sample.target`.

    Raises:
        UserError: If the task is unknown.
    """

    def __init__(
        self,
        task: str,
        images: int,
        *,
        seed: int = 0,
        split: str = "train",
        turns: int = 1,
        answers: bool = True,
    ):
        if task not in SOURCES:
            raise UserError(f"task {task!r} of scenes is unknown; use {', '.join(SOURCES)}")
        self.name, self.images, self.seed, self.split = task, images, seed, split
        self.turns, self.answers = turns, answers
        self.fingerprint = f"scenes-v{VERSION}-{split}-seed{seed}"

    def __len__(self) -> int:
        return self.images

    def keys(self) -> Sequence[str]:
        """Return the scenes' numbers as text."""
        return [str(i) for i in range(self.images)]

    def picture(self, image: str) -> npt.NDArray[np.uint8]:
        """Render a scene, (128, 128, 3) uint8, RGB."""
        return render(self.scene(int(image)))

    def scene(self, index: int) -> Scene:
        """Return the scene that a sample is about."""
        return sample_scene(self.seed, self.split, index)

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        rng = scene_stream(self.seed, self.split, _TURN_INDEX + index)
        if self.name == "vqa":
            kinds = rng.permutation(len(QUESTIONS))[: self.turns]
            asked = [make_example(scene, QUESTIONS[k]) for k in kinds]
            chunks = prompts.vqa([(e.question, e.answer) for e in asked])
            target: dict[str, Any] = {}
        elif self.name in ("locate", "describe"):
            chosen = [scene.shapes[k] for k in rng.permutation(len(scene.shapes))[: self.turns]]
            if self.name == "locate":
                named = [_named(scene, item, rng) for item in chosen]
                turns = [(text, item.box) for text, item in zip(named, chosen, strict=True)]
                chunks = prompts.grounding(turns, scene.size, scene.size)
            else:
                described = [(item.box, full_phrase(item)) for item in chosen]
                chunks = prompts.dense_captioning(described, scene.size, scene.size)
            target = {}
        else:
            example = make_example(scene, self.name)
            chunks, target = question(example, answers=self.answers), answer(example)
        return Sample(str(index), self.name, str(index), self.name, tuple(chunks), target)


def question(example: Example, *, answers: bool) -> list[Chunk]:
    """Return the prompt of an example; `answers`: with its answer."""
    size = example.scene.size
    if example.task == "caption":
        return prompts.captioning(example.answer if answers else None)
    if example.task == "grounding":
        return prompts.grounding([(referred(example), example.boxes[0] if answers else None)], size, size)
    if example.task == "pointing":
        right = example.choices.index(example.answer) if answers else None
        return prompts.pointing([(example.question, example.boxes, right)], size, size)
    return prompts.vqa([(example.question, example.answer if answers else None)])


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


def full_phrase(item: Object) -> str:
    """Return everything that can be said of an object."""
    return phrase(item, ("size", "texture", "colour", "name"))
