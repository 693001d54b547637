"""Questions on photographs: VQAv2, GQA, Visual7W telling, VSR, POPE and A-OKVQA."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssm_retrieval.errors import UserError
from vlm.data.files import entry, json_lines, load_json, require, structure
from vlm.data.records import Choice, Question, Statement

VQA_SPLITS = {"train": "train2014", "val": "val2014", "testdev": "test-dev2015", "test": "test2015"}


def vqav2(folder: Path, split: str) -> Iterator[Question]:
    """Yield one record per question with its ten answers; both test splits have none."""
    official = VQA_SPLITS[split]
    what = f"the {split} questions and annotations of VQA v2"
    path = require(folder, f"v2_OpenEnded_mscoco_{official}_questions.json", what)
    hidden = split in ("testdev", "test")
    known: dict[int, tuple[tuple[str, ...], str]] = {}
    if not hidden:
        answer_path = require(folder, f"v2_mscoco_{official}_annotations.json", what)
        with structure(answer_path):
            for row in load_json(answer_path)["annotations"]:
                known[row["question_id"]] = tuple(a["answer"] for a in row["answers"]), row["answer_type"]
    images = official.replace("-dev", "")
    with structure(path):
        for row in load_json(path)["questions"]:
            number = row["question_id"]
            answers, kind = ((), None) if hidden else entry(known, number, answer_path, "answers to question")
            yield Question(
                id=str(number),
                source="vqav2",
                split=split,
                image=f"{images}/COCO_{images}_{row['image_id']:012d}.jpg",
                question=row["question"],
                answers=answers,
                kind=kind,
            )


def gqa(folder: Path, split: str) -> Iterator[Question]:
    """Yield one record per balanced question with its short answer; test has none."""
    path = require(folder, f"{split}_balanced_questions.json", "the balanced questions of GQA")
    with structure(path):
        for question_id, row in load_json(path).items():
            yield Question(
                id=question_id,
                source="gqa",
                split=split,
                image=f"{row['imageId']}.jpg",
                question=row["question"],
                answers=() if split == "test" else (row["answer"],),
                kind=row.get("types", {}).get("structural"),
            )


def shuffled(right: Any, wrong: list[Any], key: str) -> tuple[tuple[Any, ...], int]:
    """Mix right and wrong options in an order that depends on `key` only.

    Args:
        right: The right option.
        wrong: The other options.
        key: Decides the order.

    Returns:
        The options, and the index of the right one.
    """
    options = [right, *wrong]
    order = random.Random(key).sample(range(len(options)), len(options))
    return tuple(options[i] for i in order), order.index(0)


def visual7w_telling(folder: Path, split: str) -> Iterator[Choice]:
    """Yield one record per question with four choices, in an order set by the question's id."""
    path = require(folder, "dataset_v7w_telling.json", "the telling questions of Visual7W")
    with structure(path):
        for image in load_json(path)["images"]:
            for qa in image["qa_pairs"] if image["split"] == split else ():
                choices, answer = shuffled(qa["answer"], qa["multiple_choices"], f"visual7w {qa['qa_id']}")
                yield Choice(
                    id=str(qa["qa_id"]),
                    source="visual7w-telling",
                    split=split,
                    image=image["filename"],
                    question=qa["question"],
                    choices=choices,
                    answer=answer,
                    kind=qa["type"],
                )


def vsr(folder: Path, split: str) -> Iterator[Statement]:
    """Yield one record per caption, true or false of the image.

    Raises:
        UserError: If a label is neither 0 nor 1.
    """
    path = require(folder, f"{split}.jsonl", "the random split of VSR (train, dev and test jsonl)")
    with structure(path):
        for number, row in enumerate(json_lines(path)):
            if row["label"] not in (0, 1):
                raise UserError(f"label {row['label']!r} is not 0 or 1")
            yield Statement(
                id=str(number),
                source="vsr",
                split=split,
                image=row["image"],
                statement=row["caption"],
                label=bool(row["label"]),
                relation=row["relation"],
            )


def pope(folder: Path, split: str) -> Iterator[Question]:
    """Yield one record per question; the splits are the three ways of choosing what is asked for.

    Raises:
        UserError: If a label is neither yes nor no.
    """
    path = require(folder, f"coco_pope_{split}.json", "POPE's questions on COCO")
    with structure(path):
        for row in json_lines(path):
            if row["label"] not in ("yes", "no"):
                raise UserError(f"label {row['label']!r} is not yes or no")
            yield Question(
                id=f"{split}-{row['question_id']}",
                source="pope",
                split=split,
                image=row["image"],
                question=row["text"],
                answers=(row["label"],),
                kind=split,
            )


# The official choices of this question (on a compass) are unusable
_AOKVQA_REPAIRS = {"bCjS888uSeyRMczZageqTp": ("n", "w", "a", "e")}


def aokvqa(folder: Path, split: str) -> Iterator[Choice]:
    """Yield one record per question with four choices; test has no answers."""
    path = require(folder, f"aokvqa_v1p0_{split}.json", "A-OKVQA 1.0")
    with structure(path):
        for row in load_json(path):
            yield Choice(
                id=row["question_id"],
                source="aokvqa",
                split=split,
                image=f"{row['image_id']:012d}.jpg",
                question=row["question"],
                choices=_AOKVQA_REPAIRS.get(row["question_id"]) or tuple(row["choices"]),
                answer=None if split == "test" else row["correct_choice_idx"],
            )
