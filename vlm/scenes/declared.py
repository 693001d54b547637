"""What is asked about scenes, one declaration per task: metric, guesses, chance, length of answers."""

from __future__ import annotations

from vlm import metrics
from vlm.data.declaration import Scored
from vlm.guesses import best_box, best_caption, most_frequent_answer
from vlm.scenes.guesses import GUESSES, image_only
from vlm.scenes.questions import CHANCE
from vlm.scenes.source import PACKED

LONGEST = 64  # tokens of an answer: a caption names eight objects in 48


def _short(name: str) -> Scored:
    return Scored(
        name=name,
        metric=metrics.EXACT,
        blind=most_frequent_answer,
        chance=CHANCE[name],
        sighted=image_only if name in GUESSES else None,
        max_new_tokens=LONGEST,
    )


SCENES: dict[str, Scored] = {
    found.name: found
    for found in (
        Scored(name="caption", metric=metrics.OBJECTS, blind=best_caption, max_new_tokens=LONGEST),
        Scored(
            name="grounding",
            metric=metrics.BOX,
            blind=best_box,
            sighted=image_only,
            max_new_tokens=LONGEST,
        ),
        *(_short(name) for name in CHANCE),
        # sources of several turns are for training only
        *(Scored(name=name, metric=None, max_new_tokens=LONGEST) for name in PACKED),
    )
}
