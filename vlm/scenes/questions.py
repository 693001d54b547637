"""Questions about a scene, as pure functions of it. Answers are balanced by construction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import TypeVar

import numpy as np

from ssm_retrieval.errors import UserError
from vlm.prompts import box_text
from vlm.scenes.scene import HELDOUT_PAIRS, Box, Object, Scene, scene_stream
from vlm.scenes.stamps import COLOURS, SHAPES

T = TypeVar("T")
Even = Callable[[int], int]  # number of ways -> which one, each equally often (`balanced`)
LETTERS = "ABCD"
# Scenes, whose indices are below 2**41, never share a random stream with a question, nor do two draws.
_BALANCE_INDEX, _QUESTION_INDEX = 2**59, 2**60
DRAW_STEP, MAX_DRAWS = 2**45, 2**14
_ATTRIBUTES = ("colour", "name", "size", "texture")


@dataclass(frozen=True)
class Example:
    """A question about a scene.

    Attributes:
        scene: The scene.
        task: Name in TASKS.
        question: Its text.
        answer: Its text.
        choices: The valid letters, or ().
        boxes: Boxes of the answer; in pointing of the candidates A .. D. In pixels.
    """

    scene: Scene
    task: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()


def make_example(scene: Scene, task: str, draw: int = 0) -> Example:
    """Return an example that a task makes of a scene.

    Args:
        scene: The scene.
        task: Name in TASKS.
        draw: Number of the question; each number asks anew about the same scene.

    Returns:
        The example.

    Raises:
        UserError: If the task is unknown, or the draw is out of range.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; valid: {', '.join(TASKS)}")
    if not 0 <= draw < MAX_DRAWS:
        raise UserError(f"draw {draw} must be in 0 .. {MAX_DRAWS - 1}")
    number = list(TASKS).index(task)
    # each task and draw has its own stream, so questions do not depend on each other
    place = _QUESTION_INDEX + draw * DRAW_STEP + scene.index * len(TASKS) + number
    return TASKS[task](
        scene, scene_stream(scene.seed, scene.split, place), partial(balanced, scene, task, draw)
    )


def balanced(scene: Scene, task: str, draw: int, ways: int) -> int:
    """Draw a number that comes equally often: once in every `ways` consecutive scenes, in random order.

    The order is the task's and draw's own, so questions about one image do not share their answers.

    Args:
        scene: The scene; its index decides the number.
        task: Name in TASKS.
        draw: Number of the question.
        ways: How many numbers there are.

    Returns:
        0 .. ways - 1.
    """
    block, place = divmod(scene.index, ways)
    number = _BALANCE_INDEX + draw * DRAW_STEP + block * 16 + list(TASKS).index(task)
    return int(scene_stream(scene.seed, scene.split, number).permutation(ways)[place])


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def subjects(scene: Scene) -> tuple[Object, ...]:
    """Return the shapes to ask about: all, or in the split `combination` those with a held-out pair."""
    if scene.split != "combination":
        return scene.shapes
    return tuple(item for item in scene.shapes if (item.colour, item.name) in HELDOUT_PAIRS)


def phrase(item: Object, attributes: Sequence[str]) -> str:
    """Return a phrase such as "large striped red star"; "shape" stands for a name that is not given."""
    words = [getattr(item, a) for a in ("size", "texture", "colour") if a in attributes]
    return " ".join([*words, item.name if "name" in attributes else "shape"])


def unique_phrases(scene: Scene, item: Object, attributes: Sequence[str] = _ATTRIBUTES) -> list[str]:
    """Return the shortest phrases that fit one shape of a scene and no other.

    Args:
        scene: The scene.
        item: The shape.
        attributes: Attributes that phrases may use.

    Returns:
        The phrases; [] if none is unique.
    """
    for length in range(1, len(attributes) + 1):
        found = [
            phrase(item, chosen)
            for chosen in combinations(attributes, length)
            if sum(all(getattr(o, a) == getattr(item, a) for a in chosen) for o in scene.shapes) == 1
        ]
        if found:
            return found
    return []


def _caption(scene: Scene, rng: np.random.Generator, even: Even) -> Example:
    """Ask for a caption; the answer lists every object in reading order."""
    parts = []
    for item in scene.objects:
        if item.kind == "shape":
            parts.append(f"a {phrase(item, _ATTRIBUTES)}")
        elif item.kind == "digit":
            parts.append(f"the {item.colour} digit {item.name}")
        else:
            parts.append(f"the {item.colour} word {item.name}")
    text = ", ".join(parts[:-1]) + f" and {parts[-1]}."
    boxes = tuple(item.box for item in scene.objects)
    return Example(scene, "caption", "Describe the image.", text[0].upper() + text[1:], boxes=boxes)


def _existence(scene: Scene, rng: np.random.Generator, even: Even) -> Example:
    """Ask whether there is a shape of a colour; yes and no alternate evenly."""
    present = {(item.colour, item.name) for item in scene.shapes}
    asked = [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        # both answers ask about the same pairs: a pair that only "no" asks about would give itself away
        if ((colour, shape) in HELDOUT_PAIRS) == (scene.split == "combination")
    ]
    yes = even(2) == 1
    colour, shape = _pick(rng, [pair for pair in asked if (pair in present) == yes])
    boxes = tuple(o.box for o in scene.shapes if (o.colour, o.name) == (colour, shape))
    article = "an" if colour[0] in "aeiou" else "a"
    return Example(
        scene, "existence", f"Is there {article} {colour} {shape}?", "yes" if yes else "no", boxes=boxes
    )


def _colour_counts(scene: Scene) -> dict[str, int]:
    counts = Counter(item.colour for item in scene.shapes)
    return {colour: counts[colour] for colour in COLOURS}


def _count(scene: Scene, rng: np.random.Generator, even: Even) -> Example:
    """Ask how many shapes have a colour; the answers that a scene allows (0 .. 3) come equally often."""
    counts = _colour_counts(scene)
    possible = sorted(set(counts.values()))
    answer = possible[even(len(possible))]
    colour = _pick(rng, [name for name, number in counts.items() if number == answer])
    boxes = tuple(item.box for item in scene.shapes if item.colour == colour)
    return Example(scene, "count", f"How many {colour} shapes are there?", str(answer), boxes=boxes)


def _attribute(scene: Scene, rng: np.random.Generator, even: Even) -> Example:
    """Ask for the colour, name, size or texture of a shape that the others identify."""
    first = even(len(_ATTRIBUTES))
    # a scene may have no shape that can be named without its colour, for example; then ask another attribute
    for asked in _ATTRIBUTES[first:] + _ATTRIBUTES[:first]:
        others = [name for name in _ATTRIBUTES if name != asked]
        options = [(item, p) for item in subjects(scene) if (p := unique_phrases(scene, item, others))]
        if options:
            break
    item, phrases = _pick(rng, options)
    word = "shape" if asked == "name" else asked
    question = f"What {word} is the {_pick(rng, phrases)}?"
    return Example(scene, "attribute", question, getattr(item, asked), boxes=(item.box,))


def _comparison(scene: Scene, rng: np.random.Generator, even: Even) -> Example:
    """Ask whether one colour has more shapes than another; yes and no alternate evenly."""
    counts = _colour_counts(scene)
    pairs = [(a, b) for a in counts for b in counts if counts[a] > counts[b]]
    more, fewer = _pick(rng, pairs)
    yes = even(2) == 1
    first, second = (more, fewer) if yes else (fewer, more)
    question = f"Are there more {first} shapes than {second} shapes?"
    return Example(scene, "comparison", question, "yes" if yes else "no")


def _spatial(scene: Scene, rng: np.random.Generator, even: Even) -> Example:
    """Ask whether a shape is left of, right of, above or below another one."""
    axes = [0, 1]
    pairs = [
        (a, b, axis)
        for a in subjects(scene)
        for b in scene.shapes
        for axis in axes
        if a is not b and (a.box[axis + 2] <= b.box[axis] or b.box[axis + 2] <= a.box[axis])
    ]
    a, b, axis = _pick(rng, pairs)
    yes = even(2) == 1
    lower, higher = (("left of", "right of"), ("above", "below"))[axis]
    relation = lower if (a.box[axis] < b.box[axis]) == yes else higher
    names = phrase(a, ("colour", "name")), phrase(b, ("colour", "name"))
    question = f"Is the {names[0]} {relation} the {names[1]}?"
    return Example(scene, "spatial", question, "yes" if yes else "no", boxes=(a.box, b.box))


def _grounding(scene: Scene, rng: np.random.Generator, even: Even) -> Example:
    """Ask for the box of a shape."""
    item = _pick(rng, subjects(scene))
    question = f"Where is the {_pick(rng, unique_phrases(scene, item))}?"
    # published format: corners as shares of the side with two decimals; `boxes` has the exact pixels
    answer = box_text(item.box, scene.size, scene.size)
    return Example(scene, "grounding", question, answer, boxes=(item.box,))


def _pointing(scene: Scene, rng: np.random.Generator, even: Even) -> Example:
    """Ask which of four boxes shows a shape; the right letter comes equally often."""
    item = _pick(rng, subjects(scene))
    others = [o for o in scene.shapes if o is not item]
    candidates = [others[k] for k in rng.permutation(len(others))[: len(LETTERS) - 1]]
    place = even(len(candidates) + 1)
    candidates.insert(place, item)
    question = f"Which box shows the {_pick(rng, unique_phrases(scene, item))}?"
    boxes = tuple(o.box for o in candidates)
    return Example(scene, "pointing", question, LETTERS[place], tuple(LETTERS[: len(boxes)]), boxes)


def _reading(scene: Scene, rng: np.random.Generator, even: Even, kind: str) -> Example:
    """Ask for the digit or the word in a scene, by `kind`."""
    item = next(o for o in scene.objects if o.kind == kind)
    return Example(scene, f"reading-{kind}", f"Which {kind} is written?", item.name, boxes=(item.box,))


TASKS: dict[str, Callable[[Scene, np.random.Generator, Even], Example]] = {
    "caption": _caption,
    "existence": _existence,
    "count": _count,
    "attribute": _attribute,
    "comparison": _comparison,
    "spatial": _spatial,
    "grounding": _grounding,
    "pointing": _pointing,
    "reading-digit": partial(_reading, kind="digit"),
    "reading-word": partial(_reading, kind="word"),
}
# Accuracy of guessing among the answers that a question allows (training never pairs a colour with its
# held-out shape).
CHANCE = {
    "existence": 1 / 2,
    "count": 1 / 4,
    "attribute": (1 / 5 + 1 / 5 + 1 / 2 + 1 / 3) / 4,
    "comparison": 1 / 2,
    "spatial": 1 / 2,
    "pointing": 1 / 4,
    "reading-digit": 1 / 10,
    "reading-word": 1 / 16,
}
