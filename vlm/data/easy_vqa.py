"""easy-VQA: questions about pictures of one shape, all of which `pip install easy-vqa` brings."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from ssm_retrieval.errors import MissingPackage, UserError
from vlm.data.files import load_json, require, structure
from vlm.data.records import Question

PARTS = ("all", "fit", "val")
ASKED = ("all", "open")
HELD_OUT = 8  # one training picture of this many is of the part "val"
SHAPES = ("circle", "rectangle", "triangle")


def installed() -> Path:
    """Return the folder of the files in the installed package, which is not imported.

    Raises:
        MissingPackage: If it is not installed.
    """
    found = importlib.util.find_spec("easy_vqa")
    if found is None or found.origin is None:
        raise MissingPackage(
            "easy-vqa has no folder of annotations and its package is missing: pip install easy-vqa"
        )
    return Path(found.origin).parent / "data"


def easy_vqa(folder: Path, split: str, part: str = "all", asked: str = "all") -> Iterator[Question]:
    """Yield one record per question; its kind is "yes/no", "shape" or "color".

    There is no official validation split, so learning rates are chosen on a part of the training pictures.

    Args:
        folder: Folder with the official files.
        split: Split of the data set.
        part: "all"; or of "train" "val", every eighth picture with its questions, or "fit", the others.
        asked: "all", or "open" for the questions whose answer is not yes or no.

    Yields:
        Records.

    Raises:
        UserError: If an option is unknown, or the part is one of a split that has no parts.
    """
    if part not in (PARTS if split == "train" else PARTS[:1]):
        raise UserError(f"part={part!r} of split {split!r} must be 'all', or in 'train' 'fit' or 'val'")
    if asked not in ASKED:
        raise UserError(f"asked={asked!r} must be 'all' or 'open'")
    path = require(folder, f"{split}/questions.json", "easy-VQA (pip install easy-vqa has it)")
    with structure(path):
        for number, (question, answer, image) in enumerate(load_json(path)):
            if part != "all" and (image % HELD_OUT == HELD_OUT - 1) != (part == "val"):
                continue
            kind = "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "color"
            if asked == "open" and kind == "yes/no":
                continue
            yield Question(
                id=str(number),
                source="easy-vqa",
                split=split,
                image=f"{split}/images/{image}.png",
                question=question,
                answers=(answer,),
                kind=kind,
            )
