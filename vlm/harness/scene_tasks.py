"""What lmms-eval calls for the tasks that `vlm.harness.export_scenes` writes: questions, pictures and scores.

The scores are those of `vlm.evaluate`: `results.score` of all answers of a task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vlm import results
from vlm.data.samples import Sample
from vlm.metrics import Row

Document = Mapping[str, Any]


def scene_documents(documents: Any) -> Any:
    """Return a `datasets.Dataset` of a task's file with its pictures as such, which logs leave out."""
    import datasets

    return documents.cast_column("image", datasets.Image())


def scene_visual(document: Document) -> list[Any]:
    """Return the picture of a document, as lmms-eval wants it: a list of Pillow images."""
    return [document["image"]]


def scene_results(document: Document, said: Sequence[str]) -> dict[str, Row]:
    """Return what `scene_score` needs of a document, for each metric of its task.

    Args:
        document: A row of the task's file, without its picture.
        said: The answer.

    Returns:
        Rows by metric.
    """
    row = {name: document[name] for name in ("id", "source", "target")} | {"said": said[0]}
    return {metric: row | {"metric": metric} for metric in json.loads(document["metrics"])}


def scene_score(rows: Sequence[Row]) -> float:
    """Return the value of one metric, from what `scene_results` gave for it."""
    samples = [Sample(r["id"], r["source"], "", r["source"], (), json.loads(r["target"])) for r in rows]
    scored = results.score(samples, [row["said"] for row in rows])
    return next(float(row["value"]) for row in scored if row["metric"] == rows[0]["metric"])
