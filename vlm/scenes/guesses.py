"""Answers of a guess that sees a scene but ignores which object is asked for: a lookup must do better.

All answers that serve such a guess equally well are given; it gets their mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from vlm.prompts import box_text
from vlm.scenes.questions import LETTERS, Example, make_example, subjects
from vlm.scenes.scene import COLOUR_COUNTS, Scene
from vlm.scenes.source import SceneSource

Guess = Callable[[Scene, Example], tuple[str, ...]]


def commonest_value(scene: Scene, example: Example) -> tuple[str, ...]:
    """Return the asked attribute's commonest values among the shapes that may be asked for."""
    asked = example.question.split()[1]  # "What colour is the small circle?"
    values = Counter(getattr(item, "name" if asked == "shape" else asked) for item in subjects(scene))
    return tuple(value for value, count in values.items() if count == max(values.values()))


def any_box(scene: Scene, example: Example) -> tuple[str, ...]:
    """Return the boxes of the shapes that may be asked for."""
    return tuple(box_text(item.box, scene.size, scene.size) for item in subjects(scene))


def any_of(*answers: str) -> Guess:
    """Return a guess for balanced answers: the scene says nothing of them."""
    return lambda scene, example: answers


GUESSES: dict[str, Guess] = {
    "existence": any_of("yes", "no"),
    "count": any_of(*(str(number) for number in (0, *COLOUR_COUNTS))),
    "attribute": commonest_value,
    "comparison": any_of("yes", "no"),
    "spatial": any_of("yes", "no"),
    "grounding": any_box,
    "pointing": any_of(*LETTERS),
}


def image_only(source: SceneSource) -> list[tuple[str, ...]]:
    """Return the guess's answers to the questions of a source.

    Args:
        source: Questions of one of the tasks in GUESSES.

    Returns:
        Equally good answers, a tuple for every sample.
    """
    scenes = map(source.scene, source.keys())
    return [GUESSES[source.name](scene, make_example(scene, source.name)) for scene in scenes]
