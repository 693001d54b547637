"""What guesses get on this study's held-out scenes: `python -m studies.vlm_cpu.floors` writes floors.csv."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ssm_retrieval.training import store
from vlm.config import Scenes
from vlm.data.config import LEARNED
from vlm.evaluate import guesses
from vlm.guesses import best_caption
from vlm.metrics import captions as metric
from vlm.scenes.source import SceneSource

TABLE = Path(__file__).with_suffix(".csv")


def floors(count: int = 400) -> pd.DataFrame:
    """task, guess, value: what guesses get that do not look, or look and ignore which object is asked for.

    On held-out scenes. Captions (CIDEr): that of the next scene, and one of training for all scenes
    (`vlm.guesses.best_caption`). The others are `vlm.scenes.guesses`.
    """
    heldout, train = (SceneSource("caption", number, split=split, answers=False)
                      for number, split in ((count, "heldout"), (LEARNED, "train")))  # fmt: skip
    known, test = ([source[i] for i in range(len(source))] for source in (train, heldout))
    right = {sample.id: sample.target["captions"] for sample in test}
    told = [texts[0] for texts in right.values()]
    cider = [
        metric.cider(dict(zip(right, said, strict=True)), right)
        for said in ([*told[1:], told[0]], best_caption(known, test))
    ]
    seen = {task: guesses(Scenes(task, count, "heldout"))[1] for task in ("attribute", "grounding")}
    rows = [
        ("caption", "the caption of another scene", cider[0]),
        ("caption", "one caption for all scenes", cider[1]),
        ("attribute", "the scene's commonest value", seen["attribute"]["accuracy"]),
        ("grounding", "the box of any shape", seen["grounding"]["iou@0.5"]),
    ]
    return pd.DataFrame(rows, columns=["task", "guess", "value"])


if __name__ == "__main__":
    store.write_bytes(TABLE, floors().to_csv(index=False, float_format="%.4f").encode())
