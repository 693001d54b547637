"""What guesses get on this study's held-out scenes: `python -m studies.vlm_cpu.floors` writes floors.csv."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from ssm_retrieval.training import store
from vlm.metrics import captions as metric
from vlm.scenes import make_example
from vlm.scenes.scene import sample_scene

TABLE = Path(__file__).with_suffix(".csv")


def floors(count: int = 400) -> pd.DataFrame:
    """task, guess, value: what guesses get that do not look, or look and ignore which object is asked for.

    From the annotation of the held-out scenes. Captions (CIDEr): that of the next scene, and one of training
    for all scenes, the best of six. attribute: the asked attribute's commonest value among the scene's
    shapes, drawn by lot if several are; grounding: the box of any shape, at random.
    """
    scenes = [sample_scene(0, "heldout", i) for i in range(count)]
    right = {str(i): [make_example(scene, "caption").answer] for i, scene in enumerate(scenes)}
    others = [
        {key: right[str((int(key) + 1) % count)][0] for key in right},
        *(
            dict.fromkeys(right, make_example(sample_scene(0, "train", i), "caption").answer)
            for i in range(6)
        ),
    ]
    cider = [metric.scores(said, right)["cider"] for said in others]
    shares: dict[str, list[float]] = {"attribute": [], "grounding": []}
    for scene in scenes:
        shapes = [item for item in scene.objects if item.kind == "shape"]
        example = make_example(scene, "attribute")
        asked = example.question.split()[1]  # What colour is the small circle?
        values = [str(getattr(item, "name" if asked == "shape" else asked)) for item in shapes]
        most = [value for value in set(values) if values.count(value) == max(map(values.count, values))]
        shares["attribute"].append((example.answer in most) / len(most))
        shares["grounding"].append(1 / len(shapes))
    rows = [
        ("caption", "the caption of another scene", cider[0]),
        ("caption", "one caption for all scenes", max(cider[1:])),
        ("attribute", "the scene's commonest value", float(np.mean(shares["attribute"]))),
        ("grounding", "the box of any shape", float(np.mean(shares["grounding"]))),
    ]
    return pd.DataFrame(rows, columns=["task", "guess", "value"])


if __name__ == "__main__":
    store.write_bytes(TABLE, floors().to_csv(index=False, float_format="%.4f").encode())
