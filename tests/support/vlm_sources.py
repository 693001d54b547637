"""Sources of questions for the tests of samples."""

from __future__ import annotations

from pathlib import Path

from vlm_files import CASES, write

from vlm.data.sources import FileSource
from vlm.data.turns import Rules

ASKED = Rules(training=False)


def source(name: str, folder: Path, rules: Rules | None = None, **options: str) -> FileSource:
    """Write the official files of CASES to a folder and return them as a source.

    Args:
        name: Name of the data set.
        folder: Folder to write to.
        rules: Rules of the samples.
        **options: Options of the source.

    Returns:
        The source.
    """
    split, files, _ = CASES[name]
    write(folder, files)
    return FileSource(name, folder, folder / "images", split, rules=rules, **options)


def questions(name, images):
    """Official VQAv2 or GQA files with a question for each entry of images, asking after its number."""
    if name == "gqa":
        rows = {str(i): {"imageId": image, "question": f"n{i}?", "answer": str(i)} for i, image in images}
        return {"train_balanced_questions.json": rows}
    ids = [{"question_id": i, "image_id": image, "question": f"n{i}?"} for i, image in images]
    answers = [
        {"question_id": i, "answer_type": "x", "answers": [{"answer": a} for a in ["no", str(i), str(i)]]}
        for i, _ in images
    ]
    return {
        "v2_OpenEnded_mscoco_train2014_questions.json": {"questions": ids},
        "v2_mscoco_train2014_annotations.json": {"annotations": answers},
    }
