"""Reading: TextVQA, AI2D, DocVQA, InfographicVQA and OCR-VQA."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from operator import itemgetter
from pathlib import Path, PurePosixPath

from ssm_retrieval.errors import UserError
from vlm.data.captions import ocr_tokens, text_image
from vlm.data.files import load_json, require, structure, text_lines
from vlm.data.records import Choice, Question


def textvqa(folder: Path, split: str) -> Iterator[Question]:
    """Yield one record per question with ten answers (test: none) and the OCR tokens of its image."""
    path = require(folder, f"TextVQA_0.5.1_{split}.json", f"the {split} questions of TextVQA 0.5.1")
    ocr = ocr_tokens(folder, split)
    with structure(path):
        for row in load_json(path)["data"]:
            yield Question(
                id=str(row["question_id"]),
                source="textvqa",
                split=split,
                image=text_image(row["image_id"], split),
                width=row.get("image_width"),
                height=row.get("image_height"),
                question=row["question"],
                answers=() if split == "test" else tuple(row["answers"]),
                ocr=ocr.get(row["image_id"], ()),
            )


def ai2d_split(image_id: str, test_ids: set[str]) -> str:
    """Return the split of a diagram: test by the official list, else val for one in ten, by a hash of the id.

    All questions about a diagram are in one split, so train and val cannot overlap.
    """
    if image_id in test_ids:
        return "test"
    return "val" if hashlib.sha256(image_id.encode()).digest()[0] % 10 == 0 else "train"


def ai2d(folder: Path, split: str) -> Iterator[Choice]:
    """Yield one record per question; `ocr` has the lines `label: text` of a diagram's text boxes, by label.

    Labels are the letters that questions and answers use.
    """
    what = "ai2d-all.zip and ai2d_test_ids.csv of AI2D"
    ids_path = require(folder, "ai2d_test_ids.csv", what)
    questions = require(folder, "ai2d/questions", what)
    annotations = require(folder, "ai2d/annotations", what)
    test_ids = {line.strip() for line in text_lines(ids_path)}
    for path in sorted(questions.glob("*.json")):
        name = path.name.removesuffix(".json")
        if ai2d_split(PurePosixPath(name).stem, test_ids) != split:
            continue
        boxes_path = require(annotations, path.name, what)
        with structure(boxes_path):
            rows = load_json(boxes_path)["text"].values()
            labelled = sorted(((row["replacementText"], row["value"]) for row in rows), key=itemgetter(0))
            ocr = tuple(f"{label}: {text}" for label, text in labelled)
        with structure(path):
            for question, row in load_json(path)["questions"].items():
                yield Choice(
                    id=row["questionId"],
                    source="ai2d",
                    split=split,
                    image=f"ai2d/images/{name}",
                    question=question,
                    choices=tuple(row["answerTexts"]),
                    answer=row["correctAnswer"],
                    ocr=ocr,
                )


DOCVQA_FILES = {"train": "train_v1.0_withQT.json", "val": "val_v1.0_withQT.json", "test": "test_v1.0.json"}
INFOGRAPHIC_FILES = {
    "train": "infographicsVQA_train_v1.0.json",
    "val": "infographicsVQA_val_v1.0_withQT.json",
    "test": "infographicsVQA_test_v1.0.json",
}


def _pages(source: str, path: Path, split: str, image_field: str) -> Iterator[Question]:
    with structure(path):
        for row in load_json(path)["data"]:
            yield Question(
                id=str(row["questionId"]),
                source=source,
                split=split,
                image=row[image_field],
                question=row["question"],
                answers=() if split == "test" else tuple(row["answers"]),
            )


def docvqa(folder: Path, split: str) -> Iterator[Question]:
    """Yield one record per question about a page with all its accepted answers; test has none.

    Questions begin with a capital, as in the released code; many do not in the file.
    """
    path = require(folder, DOCVQA_FILES[split], f"the {split} questions of DocVQA (task 1)")
    for record in _pages("docvqa", path, split, "image"):
        yield replace(record, question=record.question[:1].upper() + record.question[1:])


def infographicvqa(folder: Path, split: str) -> Iterator[Question]:
    """Yield one record per question about an infographic with all its accepted answers; test has none."""
    path = require(folder, INFOGRAPHIC_FILES[split], f"the {split} questions of InfographicVQA (task 3)")
    return _pages("infographicvqa", path, split, "image_local_name")


def ocrvqa(folder: Path, split: str) -> Iterator[Question]:
    """Yield one record per question about a book's cover.

    An image is `images/KEY` with the file ending of its address.

    Raises:
        UserError: If a book has more questions than answers, or fewer.
    """
    path = require(folder, "dataset.json", "OCR-VQA's dataset.json")
    number = {"train": 1, "val": 2, "test": 3}[split]
    with structure(path):
        for key, row in load_json(path).items():
            if row["split"] != number:
                continue
            if len(row["questions"]) != len(row["answers"]):
                raise UserError(
                    f"{key} has {len(row['questions'])} questions and {len(row['answers'])} answers"
                )
            ending = PurePosixPath(row["imageURL"]).suffix
            for i, (question, answer) in enumerate(zip(row["questions"], row["answers"], strict=True)):
                yield Question(
                    id=f"{key}-{i}",
                    source="ocr-vqa",
                    split=split,
                    image=f"images/{key}{ending}",
                    question=question,
                    answers=(answer,),
                )
