"""What the demo asks, and what a model answers: everything that needs no browser."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vlm import results
from vlm.answering import Answerer, say
from vlm.data.samples import Sample
from vlm.information_flow import group_weights, layer_flows
from vlm.pictures import Picture
from vlm.predict import wording
from vlm.prompts import END
from vlm.scenes import TASKS, Example, Scene, make_example
from vlm.scenes.source import answer, conversation
from vlm.tokenizer import SPECIAL, Text

DRAWS = 3  # questions of a task about one scene
CAPTION = "Describe the image."  # the question of `vlm.scenes` that asks for a caption
Maps = dict[str, npt.NDArray[np.float64]]  # quantity of `vlm.information_flow` -> (side, side)


@dataclass(frozen=True)
class Question:
    """A question about a picture.

    Attributes:
        text: As asked.
        sample: The prompt, and the right answer if it is known.
        example: Example of a scene; None for a question of the user's.
    """

    text: str
    sample: Sample
    example: Example | None = None


@dataclass(frozen=True)
class Reply:
    """A model's answer, and what it read and wrote while answering.

    Attributes:
        question: What was asked.
        said: The answer.
        maps: Layer -> quantity -> (side, side), mean over the tokens of the answer.
        ratios: Layer -> quantity -> ratio of the target's patches to those of other shapes; {} unless the
            question asks for the box of a scene's shape.
        unknown: Words of the question that the model cannot read.
    """

    question: Question
    said: str
    maps: dict[int, Maps]
    ratios: dict[int, dict[str, float]]
    unknown: tuple[str, ...] = ()

    @property
    def right(self) -> bool | None:
        """Whether the answer is right; None if that is not known, or no matter of yes or no."""
        return results.right(self.question.sample, self.said)


def questions(scene: Scene) -> list[Question]:
    """Return what can be asked about a scene: DRAWS questions a task, those for a box first."""
    found: dict[str, Question] = {}
    for task in sorted(TASKS, key=lambda name: name != "grounding"):
        for draw in range(DRAWS):
            example = make_example(scene, task, draw)
            chunks = tuple(conversation([example], answers=False))
            sample = Sample(str(scene.index), task, str(scene.index), task, chunks, answer(example))
            found.setdefault(example.question, Question(example.question, sample, example))
    return list(found.values())


def typed(text: str, picture: Picture) -> Question:
    """Word a user's own question, whose answer is not known.

    Args:
        text: The question; "" asks for a caption, as does CAPTION.
        picture: (height, width, 3) uint8, RGB.

    Returns:
        The question.
    """
    height, width = picture.shape[:2]
    text = text.strip() or CAPTION
    chunks = tuple(wording("" if text == CAPTION else text, "auto", width, height))
    return Question(text, Sample("0", "picture", "0", "typed", chunks))


@torch.no_grad()
def ask(contestant: Answerer, picture: Picture, asked: Question) -> Reply:
    """Answer a question, and record what the model reads and writes while answering.

    Args:
        contestant: The model.
        picture: (height, width, 3) uint8, RGB.
        asked: The question.

    Returns:
        The greedy answer and its maps.
    """
    model, text, side = contestant.model, contestant.text, contestant.eyes.side
    ids, features = contestant.ids(asked.sample.chunks), contestant.features([picture])
    (said,) = say(model, contestant.run, torch.tensor([ids]), features)
    end = text.encode(END)[0]
    words = said[: said.index(end)] if end in said else said
    # positions that predict the answer, or its end
    at = list(range(len(ids) - 1, len(ids) - 1 + max(1, len(words))))
    flows = layer_flows(model, torch.tensor([ids + words]), features, at)
    maps = {
        layer: {
            name: value[0].double().mean(0).view(side, side).numpy()
            for name, value in found.quantities().items()
        }
        for layer, found in flows.items()
    }
    prompt = "".join(chunk.text for chunk in asked.sample.chunks)
    return Reply(asked, text.decode(said), maps, _ratios(asked, maps, side), unknown(text, prompt))


def _ratios(asked: Question, maps: dict[int, Maps], side: int) -> dict[int, dict[str, float]]:
    if asked.example is None or asked.example.task != "grounding":
        return {}
    means = group_weights(asked.example.scene, asked.example.boxes[0], side)
    return {
        layer: {
            name: float(values.reshape(-1) @ means["target"] / (values.reshape(-1) @ means["distractor"]))
            for name, values in found.items()
        }
        for layer, found in maps.items()
    }


def unknown(text: Text, said: str) -> tuple[str, ...]:
    """Return the pieces of a text that a tokenizer of `vlm.tokenizer.from_words` has no token for."""
    encoded = text.tokenizer.encode(said, add_special_tokens=False)
    places = zip(encoded.tokens, encoded.offsets, strict=True)
    return tuple(said[start:stop].strip() for token, (start, stop) in places if token == SPECIAL[-1])
