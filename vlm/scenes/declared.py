"""What is asked about scenes, one declaration per task: metric, blind guess, chance, length of answers."""

from __future__ import annotations

from vlm import metrics
from vlm.data.declaration import Scored
from vlm.guesses import best_box, most_frequent_answer
from vlm.scenes.questions import CHANCE
from vlm.scenes.source import PACKED

LONGEST = 64  # tokens of an answer: a caption names eight objects in 48


def _short(name: str) -> Scored:
    return Scored(
        name=name,
        metric=metrics.EXACT,
        blind=most_frequent_answer,
        chance=CHANCE[name],
        max_new_tokens=LONGEST,
    )


SCENES: dict[str, Scored] = {
    found.name: found
    for found in (
        # many captions are right, so no single answer can be learned without the image
        Scored(name="caption", metric=metrics.CAPTIONS, max_new_tokens=LONGEST),
        Scored(name="grounding", metric=metrics.BOX, blind=best_box, max_new_tokens=LONGEST),
        *(_short(name) for name in CHANCE),
        # sources of several turns are for training only
        *(Scored(name=name, metric=None, max_new_tokens=LONGEST) for name in PACKED),
    )
}
